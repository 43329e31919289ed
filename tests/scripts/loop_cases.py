"""Launched on ranks: each case of a JSON file takes its steps in a loop of one's own, on rows that differ in number.

A case is ``{"name", "task", "method", "sizes", "loop", "scaler", "spoilt", "mixed_precision"}``, where ``sizes`` lists
for each rank the rows of its micro-batches and ``spoilt`` the calls of backward in which rank 1's gradient overflows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from processes import run_cases
from tasks import make_task
from torch import Tensor, nn

from hf_lightsam import SAM, LightSAM
from hf_lightsam.loop import SharpnessAwareLoop

STEPS = 10
NUM_ROWS = 40
METHODS: dict[str, Callable[[Any], Any]] = {
    # AdaGrad and Adam scale gradients that are 0 up to rounding up to full size, hence this eps.
    "lightsam": lambda params: LightSAM(params, 1e-3, 0.1, eps=1e-5),
    "lightsam_norm": lambda params: LightSAM(params, 1e-2, 0.1, variant="adagrad_norm", eps=1e-5),
    "sam": lambda params: SAM(params, "sgd", 0.1, lr=0.1),  # Adam hides errors of scale; SGD shows them
}

Batch = dict[str, Tensor]


def collate(rows: list[dict[str, Any]]) -> Batch:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def count_tokens(batch: Batch) -> int:
    """Count what a causal language model's mean is over: the first token is nobody's next one."""
    return int((batch["labels"][:, 1:] != -100).sum())


def counter(task: str) -> Callable[[Batch], int] | None:
    return count_tokens if task == "causal_lm" else None


def windows(task: str, sizes: list[list[int]]) -> list[list[list[Batch]]]:
    """Return for each step and rank its micro-batches: consecutive rows, the ranks' one after the other."""
    rows = make_task(task, NUM_ROWS)[1]
    per_step = sum(map(sum, sizes))
    steps = []
    for step in range(STEPS):
        position = step * per_step
        ranks = []
        for of_rank in sizes:
            batches = []
            for size in of_rank:
                batches.append(collate([rows[(position + i) % NUM_ROWS] for i in range(size)]))
                position += size
            ranks.append(batches)
        steps.append(ranks)
    return steps


class Overflow:
    """Makes the classifier's gradient infinite in given calls of backward."""

    def __init__(self, model: nn.Module, calls: list[int]) -> None:
        self.count, self.calls = -1, set(calls)
        model.classifier.weight.register_hook(self)

    def __call__(self, gradient: Tensor) -> Tensor:
        self.count += 1
        return gradient * torch.inf if self.count in self.calls else gradient


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Take the steps; return the weights after each of them and whether all ranks had the same."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision=case.get("mixed_precision", "no"))
    if case.get("scaler"):
        from test_precision import scale

        scale(accelerator)
    rank = accelerator.process_index
    model, _ = make_task(case["task"])
    model.train()
    if rank == 1 and "spoilt" in case:
        Overflow(model, case["spoilt"])
    model, optimizer = accelerator.prepare(model, METHODS[case["method"]](model.parameters()))
    loop = SharpnessAwareLoop(
        accelerator,
        model,
        optimizer,
        lambda model, batch: model(**batch).loss,
        count_items=counter(case["task"]),
        **case.get("loop", {}),
    )
    weights, scales, norms, agree = [flat(model)], [], [], True
    for ranks in windows(case["task"], case["sizes"]):
        result = loop.step(ranks[rank])
        weights.append(flat(model))
        everywhere = accelerator.gather(weights[-1].unsqueeze(0))
        agree &= all(torch.equal(everywhere[0], other) for other in everywhere)
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        norms.append(None if result.grad_norm is None else float(result.grad_norm))
        if case.get("scaler"):
            scales.append(accelerator.scaler.get_scale())
    return {"weights": torch.stack(weights), "ranks_agree": agree, "scales": scales, "grad_norms": norms}


if __name__ == "__main__":
    run_cases(Path(sys.argv[1]), run)
