"""Passes whose gradients stay on their rank."""

from __future__ import annotations

from contextlib import AbstractContextManager

from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def no_sync(accelerator: Accelerator, model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which a prepared model's gradients are not averaged over ranks.

    ``Accelerator.no_sync`` does nothing on a single process, where DDP, once launched by torchrun, is wrapped around
    the model all the same and waits for the gradient of every parameter (accelerate 1.15).
    """
    return model.no_sync() if isinstance(model, DistributedDataParallel) else accelerator.no_sync(model)
