"""Launched on two ranks: measure the sharpness of a network whose rows the ranks share unequally."""

from __future__ import annotations

import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import PartialState
from conftest import make_args, make_bert, make_rows
from processes import run_cases
from transformers import EvalPrediction

from hf_lightsam import LightSAMTrainer
from hf_lightsam.sharpness import (
    HessianOperator,
    SharpnessCallback,
    hessian_eigenvalues,
    linear_connectivity,
    loss_landscape,
    m_sharpness,
    traces_of_powers,
)
from hf_lightsam.sharpness.report import Settings, measure

SHARES = {1: [[3, 2, 2]], 2: [[3, 2], [2]]}
"""Sizes of the micro-batches of each rank, by the number of ranks."""


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def share(num_ranks: int, rank: int) -> list[Any]:
    rows, start, found = make_rows(7), 0, []
    for owner, sizes in enumerate(SHARES[num_ranks]):
        for size in sizes:
            part, start = rows[start : start + size], start + size
            if owner == rank:
                found.append({name: torch.stack([row[name] for row in part]) for name in part[0]})
    return found


def run(folder: Path, case: dict[str, Any]) -> Any:
    """Measure everything; or train with the callback."""
    if case["name"] == "callback":
        return train(folder)
    state = PartialState()
    batches = share(state.num_processes, state.process_index)
    model, other = make_bert().double(), make_bert(seed=1).double()
    shared: dict[str, Any] = {"distributed": True}
    hessian = HessianOperator(model, batches, **shared)
    vector = hessian.random_vector(torch.Generator().manual_seed(0))
    kinds = [{"kind": kind, "adaptive": adaptive} for kind in ("worst", "average") for adaptive in (False, True)]
    line = linear_connectivity(model, other, batches, num_points=3, compute_metrics=accuracy, **shared)
    return {
        "product": hessian @ vector,
        "eigenvalues": hessian_eigenvalues(hessian).values,
        "traces": {p: estimate.value for p, estimate in traces_of_powers(hessian, num_probes=1).items()},
        "mean of squares": hessian.mean_of_powers(vector, 2),
        "sharpness": [asdict(m_sharpness(model, batches, 0.3, num_steps=2, **kind, **shared)) for kind in kinds],
        "groups": asdict(m_sharpness(model, batches, 0.3, 1, **shared)),
        "landscape": loss_landscape(model, batches, num_points=3, **shared).losses,
        "line": line.losses,
        "accuracy": line.metrics["accuracy"],
        "moments": {count: moments_of(model, batches, count) for count in (2, 7)},
    }


def moments_of(model: Any, batches: list[Any], rows: int) -> list[float]:
    """Return the moments of the Hessian over the first rows of all ranks."""
    settings = Settings(top_k=0, num_probes=0, radii=(), adaptive_radii=(), moment_rows=rows, num_points=0)
    report = measure("model", model, batches, settings, distributed=True)
    return [moment.value for moment in report.moments.values()]


def train(folder: Path) -> list[dict[str, float]]:
    """Train two steps with the callback; return what it logged."""
    options = {"train_sampling_strategy": "sequential", "ddp_find_unused_parameters": False, "adam_epsilon": 1e-5}
    args = make_args(
        folder, max_steps=2, per_device_train_batch_size=8 // PartialState().num_processes, optim="sam", **options
    )
    trainer = LightSAMTrainer(make_bert(dropout=0.0), args, train_dataset=make_rows(16))
    measures: Any = ("trace", "m_sharpness")
    callback = SharpnessCallback(trainer, make_rows(7), measures, every=1, batch_size=4, num_probes=2)
    trainer.add_callback(callback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "hessian_trace" in entry]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    PartialState(cpu=True)
    run_cases(folder, partial(run, folder))
