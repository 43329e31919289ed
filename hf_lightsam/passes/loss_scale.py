"""Take the loss scale of float16 training out of the ascent gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..optim import SharpnessAwareOptimizer


@torch.no_grad()
def unscale_ascent_gradients(optimizer: SharpnessAwareOptimizer, scaler: Any | None) -> None:
    """Divide the gradients by the scale of ``scaler``, on the device.

    ``GradScaler.unscale_`` may be called once a step, and that call is the descent's. Gradients that overflowed stay
    infinite or NaN, and so make no perturbation; the scaler sees the descent's overflow and skips the step as ever.

    Args:
        optimizer: Over the parameters.
        scaler: A ``torch.amp.GradScaler``, or None for no scaling.
    """
    if scaler is None or not scaler.is_enabled():
        return
    for group in optimizer.param_groups:
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        for gradient in gradients:
            gradient.div_(scaler.scale(torch.ones((), device=gradient.device)))
