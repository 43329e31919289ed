"""The ascent of Sparse SAM: along the normalised gradient, in a selection of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ...errors import UsageError
from .base import Group, Kernels, gradient_norm
from .normalized_gradient import NormalizedGradient

NORM_FLOOR = 1e-7
"""Added to the gradient norm, as in the authors' implementation (Mi-Peng/Sparse-Sharpness-Aware-Minimization)."""

BUCKET_BYTES = 1 << 26
"""Masked gradients that exist at a time, up to the size of one parameter: no copy of the whole model is made."""


class MaskedGradient(NormalizedGradient):
    r"""Steps along the gradient where a mask m of zeros and ones allows it.

    .. math:: w = x \pm \eta \, \frac{g}{\lVert g \rVert_2 + 10^{-7}} \odot m

    Mi et al., "Make Sharpness-Aware Minimization Stronger: A Sparsified Perturbation Approach" (arXiv 2210.05177), the
    perturbation of SSAM. The norm is of the whole gradient, masked weights with it: a mask shortens the perturbation.
    Groups may have their own radius; the norm is over all of them.

    Args:
        params: See :class:`~hf_lightsam.optim.rules.Rule`. Sharded parameters (FSDP2) are refused.
        lr: Length of the step where all weights are selected.
        **options: ``weight_decay``, ``maximize``, ``foreach``, ``fused`` of :class:`~hf_lightsam.optim.rules.Rule`.

    State of each parameter: ``mask`` (bool, shape of the parameter), see :meth:`set_masks`; ones if none was set.
    """

    has_state = True

    def set_masks(self, parameters: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
        """Make ``masks`` (bool, the parameters' shapes) those of ``parameters`` from now on.

        Raises:
            UsageError: For a mask of another dtype or shape, or a sharded parameter.
        """
        for parameter, mask in zip(parameters, masks, strict=True):
            refuse_shard(parameter)
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise UsageError(
                    f"masks: one is {mask.dtype} of shape {tuple(mask.shape)}; expected torch.bool of shape "
                    f"{tuple(parameter.shape)}"
                )
        for parameter, mask in zip(parameters, masks, strict=True):
            self.state[parameter]["mask"] = _mask_like(parameter, mask)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and make the masks booleans again: torch casts all state to the parameters' dtype."""
        super().load_state_dict(state_dict)
        for parameter, state in self.state.items():
            if "mask" in state:
                state["mask"] = _mask_like(parameter, state["mask"])

    def _init_state(self, parameter: Tensor, group: Group) -> None:
        refuse_shard(parameter)
        self.state[parameter]["mask"] = _mask_like(parameter, torch.ones((), dtype=torch.bool))

    def _prepare(self, parameters: Sequence[Tensor], grad_norm: Tensor | None, skip: Tensor | None) -> None:
        self._inverse_norm = 1.0 / (gradient_norm(parameters, grad_norm) + NORM_FLOOR)

    def _update(
        self,
        group: Group,
        parameters: Sequence[Tensor],
        weights: list[Tensor],
        gradients: list[Tensor],
        kernels: Kernels,
    ) -> None:
        masks = [self.state[p]["mask"] for p in parameters]
        for part in _buckets(gradients):
            masked = list(torch._foreach_mul(gradients[part], masks[part]))
            super()._update(group, parameters[part], weights[part], masked, kernels)


def refuse_shard(parameter: Tensor) -> None:
    """Refuse a sharded parameter: masks are chosen over all weights, of which a rank then holds a part only."""
    if isinstance(parameter, DTensor):
        raise UsageError(
            f"params: a parameter of shape {tuple(parameter.shape)} is sharded (DTensor); expected whole parameters, "
            "as with DDP or a single process: Sparse SAM selects weights over the whole model"
        )


def _mask_like(parameter: Tensor, mask: Tensor) -> Tensor:
    """Return ``mask`` as booleans with the memory layout of ``parameter``, which fused kernels take for granted."""
    return torch.empty_like(parameter, dtype=torch.bool, requires_grad=False).copy_(mask)


def _buckets(tensors: Sequence[Tensor]) -> Iterator[slice]:
    """Split a list into runs of at most :data:`BUCKET_BYTES` (or of one larger tensor)."""
    start = size = 0
    for index, tensor in enumerate(tensors):
        if index > start and size + tensor.nbytes > BUCKET_BYTES:
            yield slice(start, index)
            start, size = index, 0
        size += tensor.nbytes
    yield slice(start, len(tensors))
