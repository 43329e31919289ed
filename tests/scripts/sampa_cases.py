"""Launched on one rank or several: SAMPa in the Trainer, and in a loop of one's own over rows that differ in number.

A case is that of ``train_cases.py`` or, with ``sizes``, a loop: rows of each micro-batch of each rank. ``norm`` gives
the model a BatchNorm before its classifier, ``spoilt`` names calls of backward whose gradient overflows under a scaler.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import train_cases
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import run_cases
from tasks import make_task
from torch import Tensor, nn

from hf_lightsam.glue.dry_run import fsdp_on_cpus
from hf_lightsam.loop import SharpnessAwareLoop
from hf_lightsam.optim.sampa import SAMPa

STEPS = 10
NUM_ROWS = 40


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def step_rows(rows: list[dict[str, Any]], sizes: list[list[int]], step: int) -> list[list[dict[str, Tensor]]]:
    """Return each rank's micro-batches: consecutive rows, the ranks' one after the other."""
    position = step * sum(map(sum, sizes))
    ranks = []
    for of_rank in sizes:
        batches = []
        for size in of_rank:
            batches.append(collate([rows[(position + i) % len(rows)] for i in range(size)]))
            position += size
        ranks.append(batches)
    return ranks


class Overflow:
    """Makes the classifier's gradient infinite in given calls of backward."""

    def __init__(self, model: nn.Module, calls: list[int]) -> None:
        self.count, self.calls = -1, set(calls)
        model.classifier.weight.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        return gradient * torch.inf if self.count in self.calls else gradient


class Counter:
    """Counts the rows that a model runs forward."""

    def __init__(self, model: nn.Module) -> None:
        self.rows = 0
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.rows += len(kwargs["input_ids"])


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run_loop(case: dict[str, Any]) -> dict[str, Any]:
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    if case.get("scaler"):
        from test_precision import scale

        scale(accelerator)
    model, rows = make_task("classification", NUM_ROWS)
    if case.get("norm"):
        model.dropout = nn.BatchNorm1d(16)
        if case["norm"] == "sync":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if case.get("unused"):  # a parameter that no loss depends on, and one that a single row's does
        model.unused = nn.Parameter(torch.ones(3))
    model.train()
    if accelerator.process_index == accelerator.num_processes - 1:
        Overflow(model, case.get("spoilt", []))
    counter = Counter(model)
    bare = model
    options = case.get("options", {"descent": "sgd", "lr": 0.1, "momentum": 0.9})
    model, optimizer = accelerator.prepare(model, SAMPa(model.parameters(), rho=0.1, weight_decay=0.01, **options))
    loop = SharpnessAwareLoop(accelerator, model, optimizer, lambda model, batch: model(**batch).loss)
    weights, scales, results = [flat(model)], [], []
    for step in range(case.get("steps", STEPS)):
        result = loop.step(step_rows(rows, case["sizes"], step)[accelerator.process_index])
        weights.append(flat(model))
        results.append({"loss": result.loss, **result.measures})
        scales.append(accelerator.scaler.get_scale() if case.get("scaler") else None)
    everything = [torch.stack(weights).flatten()]
    everything += [buffer.detach().double().flatten() for buffer in bare.buffers()]
    own = torch.cat([tensor.double() for tensor in everything]).unsqueeze(0)
    everywhere = accelerator.gather(own)
    return {
        "weights": torch.stack(weights),
        "ranks_agree": all(torch.equal(everywhere[0], other) for other in everywhere),
        "scales": scales,
        "measures": results,
        "rows": accelerator.gather(torch.tensor([counter.rows])),
        "buffers": {name: buffer.detach().clone() for name, buffer in bare.named_buffers()},
    }


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    if "HF_LIGHTSAM_TEST_DEVICE" in os.environ:  # under an engine
        import engine_cases

        return engine_cases.run(folder, case)
    return run_loop(case) if "sizes" in case else train_cases.run(folder, case)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with fsdp_on_cpus() if "HF_LIGHTSAM_TEST_DEVICE" in os.environ else nullcontext():
        run_cases(folder, partial(run, folder))
