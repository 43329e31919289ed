"""Keep the descent pass from updating running statistics a second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def modules_with_running_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the batch- and instance-normalisation modules of ``model`` that track running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]


@contextmanager
def frozen_running_statistics(modules: Sequence[_NormBase]) -> Iterator[None]:
    """In the body, ``modules`` normalise by the batch's statistics as in training; the running ones are put back after.

    The ascent pass has updated them, at the weights; the descent pass, at perturbed weights, must not (the pitfall that
    davda54/sam warns of). Saved and copied back, since with ``track_running_stats`` off batch normalisation leaves them
    alone, but instance normalisation does not.
    """
    buffers = [buffer for module in modules for buffer in module.buffers(recurse=False)]
    saved = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
