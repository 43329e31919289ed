"""One run on the small non-convex regression of ``parameter_agnostic.py``, with the optimizers as users have them.

Unlike there, ``rho`` has the package's default units and ``lr`` decays linearly to zero, as in fine-tuning.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from finetuning import has_radius
from parameter_agnostic import Problem
from torch import Tensor

from hf_lightsam.optim.recipes import get_recipe

WORST = -1.0
"""Score of a run that diverges: the gradient grew tenfold, or more."""


@dataclass(frozen=True)
class SyntheticRun:
    """What makes two runs the same; names as in :class:`finetuning.Run`."""

    optim: str = "lightsam_adam"
    rho: float | None = None
    optim_args: str = ""
    rho_warmup: float = 0.0
    lr: float = 1e-2
    num_steps: int = 3000
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        """Return them by name."""
        return dataclasses.asdict(self)


def make_optimizer(run: SyntheticRun, weights: Tensor) -> torch.optim.Optimizer:
    """Return the run's optimizer."""
    if not has_radius(run.optim):
        return torch.optim.AdamW([weights], lr=run.lr, weight_decay=0.0, fused=True)
    recipe = get_recipe(run.optim)
    # No weight decay anywhere: torch's AdamW, SAM's descent, would otherwise have one of 0.01.
    options = recipe.parse(run.optim_args) | ({} if run.rho is None else {"rho": run.rho})
    optimizer = recipe.optimizer([weights], **recipe.arguments(run.lr, options))
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    return optimizer


def minimize(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Run once.

    Args:
        settings: Of a :class:`SyntheticRun`, by name.

    Returns:
        The settings; ``score``, the decades by which the norm of the full gradient fell, from the start to the mean
        over the last tenth of the steps (:data:`WORST` at least); ``seconds``.
    """
    start = time.perf_counter()
    run = SyntheticRun(**settings)
    problem = Problem(run.seed)
    x = torch.full((problem.rows.shape[1],), 0.1, dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer(run, x)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / run.num_steps)
    radius = run.rho or 0.0
    norms = torch.full((run.num_steps,), torch.inf, dtype=torch.float64)
    for step in range(run.num_steps):
        norms[step] = torch.linalg.vector_norm(problem.gradient(x.detach(), problem.rows, problem.targets))
        if not norms[step] < 1e100:
            break
        rows, targets = problem.minibatch()

        def closure(rows: Tensor = rows, targets: Tensor = targets) -> Tensor:
            x.grad = problem.gradient(x.detach(), rows, targets)
            return problem.loss(x.detach(), rows, targets)

        if run.rho_warmup:
            factor = min(1.0, (step + 1) / (run.rho_warmup * run.num_steps))
            optimizer.param_groups[0]["rho"] = factor * radius
        optimizer.step(closure)  # type: ignore[arg-type]
        schedule.step()
    last = float(norms[-(run.num_steps // 10) :].mean())
    fall = math.log10(float(norms[0]) / max(last, 1e-12)) if math.isfinite(last) else WORST
    return {**run.settings(), "score": max(WORST, fall), "seconds": round(time.perf_counter() - start, 1)}
