"""Radii that change while training, beyond the papers: tied to the learning rate's schedule, or to the steps taken.

The ascent of a form that does not shrink (SAM, LightSAM-III) keeps its length however small the steps become. What
follows from a radius that is large beside them is not a visible overshoot but a model that stays where it is: near a
saddle, as a pretrained encoder under a new classifier is, the perturbed gradient points *back* wherever the model has
come less far along the way out than the radius (arXiv 2301.06308), and it comes no further.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors import difference_norm, local
from .rules.base import Group

RHO_SCHEDULES = ("constant", "lr")

STEP_SHARE = 0.03
"""The longest perturbation that ``adaptive_rho`` allows, in lengths of the last descent step.

A choice of this package, from fine-tunings of a two-layer encoder: 0.3 slowed LightSAM-III and SAM down, and 1 kept III
at chance. Steps without momentum, as AdaGrad's, go on less far for their length, and 0.1 was too much there.
"""

LAST_STEP = "last_step"
"""Option of the parameter groups that carries the length of the last step: a tensor, so that nothing waits for it."""


def schedule_factor(group: Group) -> float | Tensor:
    """Return what the learning rate's schedule has made of it: the present one over that at the start, at most 1.

    Args:
        group: Of the optimizer; most of torch's schedulers leave ``initial_lr`` in it, and without one the factor is 1.
            (``OneCycleLR`` and ``CyclicLR`` leave their lowest rate there, ``ReduceLROnPlateau`` leaves none.)

    Returns:
        A number; where the learning rate is a tensor, a scalar tensor, for which nothing waits.
    """
    initial = group.get("initial_lr", 0.0)
    if isinstance(group["lr"], Tensor):
        initial = torch.as_tensor(initial, dtype=group["lr"].dtype, device=group["lr"].device)
        return torch.where(initial > 0, group["lr"] / initial, 1.0).clamp(max=1.0)
    return min(1.0, float(group["lr"] / initial)) if initial > 0 else 1.0


def longest_perturbation(groups: Sequence[Group], device: torch.device) -> Tensor:
    """Return the length that the whole perturbation may have: 0 before the first step, when none is known."""
    last_step = next((group[LAST_STEP] for group in groups if LAST_STEP in group), torch.zeros(()))
    return STEP_SHARE * last_step.to(device)


def note_step(groups: Sequence[Group], parameters: Sequence[Tensor], before: Sequence[Tensor]) -> None:
    """Note how far a step has moved the weights that its ascent had perturbed.

    Args:
        groups: Of the optimizer; all carry the same tensor.
        parameters: The weights after the step.
        before: What they were.
    """
    length = difference_norm(parameters, before)
    for group in groups:
        noted = group.get(LAST_STEP)
        if isinstance(noted, Tensor) and (noted.device, noted.dtype) == (length.device, length.dtype):
            noted.copy_(length)  # the same tensor in each step, which a CUDA graph would have kept
        else:
            group[LAST_STEP] = length.clone()


def shorten_(parameters: Sequence[Tensor], saved: Sequence[Tensor], longest: Tensor) -> Tensor:
    """Shorten the whole perturbation to a length, in place; one that is no longer stays as it is, bit for bit.

    Args:
        parameters: The perturbed weights.
        saved: The weights as they were.
        longest: A scalar tensor.

    Returns:
        The factor, from 0 to 1: a scalar tensor on the device. Where the step's length is not finite it is 0; without a
        perturbation 1.
    """
    length = difference_norm(parameters, saved)
    share = torch.where(length > longest, longest / length, torch.ones_like(length))
    share = torch.where(torch.isfinite(longest), share, torch.zeros_like(share))
    for weights, origin in zip(local(parameters), local(saved), strict=True):
        # From the origin on and in float32 at least: 1 - share, or a share in bfloat16, would lose what is small.
        origin = origin.to(weights.device)  # where it is kept on the host
        wide = torch.promote_types(weights.dtype, torch.float32)
        factor = share.to(weights.device, wide)
        moved = torch.lerp(origin.to(wide), weights.to(wide), factor).to(weights.dtype)
        weights.copy_(torch.where(factor == 1, weights, torch.where(factor == 0, origin, moved)))
    return share
