"""A step along the gradient itself, of a length that is known on the device only."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from .base import Kernels


def scaled_gradient_(
    weights: list[Tensor], gradients: list[Tensor], scale: Tensor, maximize: bool, kernels: Kernels
) -> None:
    """Subtract (with ``maximize``, add) ``scale * gradients`` from ``weights`` in place, by torch's SGD kernels.

    Args:
        weights: Tensors to move, all on one device.
        gradients: Their gradients, same shapes and dtypes.
        scale: Scalar tensor. Fused kernels read it on its device, the others wait for its value.
        maximize: Move up.
        kernels: Which implementation, and whether it may skip.
    """
    scale = scale.to(weights[0].device)
    if kernels.fused and scale.device.type != "cpu":
        scale = scale.to(torch.float32)  # the dtype in which accelerators' fused kernels read a learning rate
    sgd(
        weights,
        gradients,
        [None] * len(weights),
        foreach=kernels.foreach,
        fused=kernels.fused,
        found_inf=kernels.found_inf,
        weight_decay=0.0,
        momentum=0.0,
        lr=scale,  # type: ignore[arg-type]  # torch takes a tensor here too
        dampening=0.0,
        nesterov=False,
        maximize=maximize,
    )
