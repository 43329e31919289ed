"""What a step costs, relative to AdamW: both timed in turn, on the same rows, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


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
    steps = _step(model, batch, baseline), _step(model, batch, optimizer)
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions + 1):
        for which, step in enumerate(steps):
            start = time.perf_counter()
            step()
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
            times[which].append(time.perf_counter() - start)
    plain, other = (statistics.median(each[1:]) for each in times)
    return other / plain


def _step(model: nn.Module, batch: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    """Return what takes one step: a sharpness-aware optimizer calls the closure twice, another once."""

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    return lambda: optimizer.step(closure)
