"""What a step costs, relative to AdamW: both timed in turn, on the same rows, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..optim import SharpnessAwareOptimizer


def relative_cost(
    model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, repetitions: int = 7
) -> float:
    """Return the median time of a step of ``optimizer`` over that of fused AdamW.

    The weights are moved meanwhile (with a learning rate of 0 they stay): hand in a model that is done with.

    Args:
        model: Computes ``model(**batch).loss``.
        batch: The inputs of one step, on the model's device.
        optimizer: Over the model's parameters.
        repetitions: Timed steps of each, in turn, so that a busy machine slows both. The first pair does not count.
    """
    baseline = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    model.train()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for which, step in enumerate((_plain_step(model, batch, baseline), _step(model, batch, optimizer))):
            start = time.perf_counter()
            step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[which].append(time.perf_counter() - start)
    plain, other = (statistics.median(each[1:]) for each in times)
    return other / plain


def _plain_step(model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def _step(model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    if not isinstance(optimizer, SharpnessAwareOptimizer):
        return _plain_step(model, batch, optimizer)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = model(**batch).loss
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)
