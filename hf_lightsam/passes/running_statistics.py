"""Keep the descent pass from updating running statistics a second time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def modules_with_running_statistics(model: nn.Module) -> list[_NormBase]:
    """Return the batch- and instance-normalisation modules of ``model`` that track running statistics."""
    return [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]


@contextmanager
def frozen_running_statistics(modules: Sequence[_NormBase]) -> Iterator[None]:
    """In the body, ``modules`` normalise by the batch's statistics as in training, and leave the running ones alone.

    The ascent pass has updated them, at the weights; the descent pass, at perturbed weights, must not (the pitfall that
    davda54/sam warns of).
    """
    for module in modules:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in modules:
            module.track_running_stats = True
