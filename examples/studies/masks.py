"""Sparsity at initialisation: which weights of an encoder stay, and the others held at zero while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_lightsam import UsageError
from hf_lightsam.optim.masks import Mask, num_perturbed, random_scores, top_k_mask

MASKS = ("random", "snip")


def maskable(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Return the weights that a mask is over: the matrices of the encoder's linear layers, its pooler's among them.

    Embeddings, LayerNorm, biases and the classifier stay dense.
    """
    return {
        f"{name}.weight": cast(nn.Parameter, module.weight)
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    }


def make_mask(model: PreTrainedModel, kind: str, sparsity: float, seed: int, batch: Mapping[str, Any]) -> Mask:
    """Return which weights stay: True in as many as the sparsity leaves, for each tensor of :func:`maskable`.

    As in the code of Shin et al. (arXiv 2311.17539).

    Args:
        model: At its initial weights.
        kind: ``"random"``: the same share of each matrix, drawn by ``seed``. ``"snip"``: the largest of
            :func:`snip_scores`, over all matrices together.
        sparsity: Share of zeros, in [0, 1).
        seed: Of the random masks.
        batch: With labels, for SNIP.

    Raises:
        UsageError: For an unknown kind, or a sparsity out of range.
    """
    if kind not in MASKS:
        raise UsageError(f"mask={kind!r}: expected {' or '.join(map(repr, MASKS))}")
    if not 0.0 <= sparsity < 1.0:
        raise UsageError(f"sparsity={sparsity!r}: expected a number in [0, 1)")
    weights = list(maskable(model).values())
    if kind == "snip":
        size = sum(weight.numel() for weight in weights)
        return top_k_mask(snip_scores(model, batch), num_perturbed(size, sparsity))
    scores = random_scores(weights, seed, 0)
    return [top_k_mask([score], num_perturbed(score.numel(), sparsity))[0] for score in scores]


def snip_scores(model: PreTrainedModel, batch: Mapping[str, Any]) -> list[Tensor]:
    r"""Return the connection sensitivity :math:`|w \cdot \partial L / \partial w|` of the maskable weights.

    SNIP (Lee et al., arXiv 1810.02340), equation 6 without its normalisation, which does not change the order. Without
    dropout, on one batch.

    Args:
        model: At its initial weights; it is left as it was.
        batch: With labels.
    """
    weights = list(maskable(model).values())
    was_training = model.training
    model.eval()
    on_device = {name: value.to(model.device) for name, value in batch.items()}
    gradients = torch.autograd.grad(model(**on_device).loss, weights)
    model.train(was_training)
    return [(weight * gradient).abs().detach() for weight, gradient in zip(weights, gradients, strict=True)]


@torch.no_grad()
def hold_at_zero(weights: Sequence[nn.Parameter], mask: Mask) -> None:
    """Set the weights outside of a mask to zero, and their gradients from now on.

    A weight of zero whose gradient always is zero stays there: momentum, decay and the ascents of this package's
    optimizers all leave it. The perturbation's ``d``, where a radius is divided by its root, still counts it.
    """
    for weight, stays in zip(weights, mask, strict=True):
        weight.mul_(stays)
        weight.register_hook(lambda gradient, stays=stays: gradient * stays.to(gradient.device))
