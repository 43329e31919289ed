"""Take the loss scale of float16 training out of gradients that no optimizer step will see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors import local


@torch.no_grad()
def unscale(gradients: Sequence[Tensor], scaler: Any | None) -> None:
    """Divide the gradients by the scale of ``scaler``, on the device.

    ``GradScaler.unscale_`` may be called once a step, and that call is the descent's. Gradients that overflowed stay
    infinite or NaN, and so make no perturbation; the scaler sees the descent's overflow and skips the step as ever.

    Args:
        gradients: To change in place.
        scaler: A ``torch.amp.GradScaler``, or None for no scaling.
    """
    if scaler is None or not scaler.is_enabled():
        return
    scales: dict[torch.device, Tensor] = {}
    for gradient in local(gradients):
        if gradient.device not in scales:
            scales[gradient.device] = scaler.scale(torch.ones((), device=gradient.device))
        gradient.div_(scales[gradient.device])
