"""Launched on one rank or several: train each case of a JSON file a little, and let rank 0 write what came out.

A case is ``{"name", "task", "num_rows", "options", "resume", "error"}``; a case that is to be refused is expected to
raise a ``UsageError``, whose text is written. Weights are compared over ranks bit for bit.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import train, weights
from processes import run_cases
from tasks import make_task

from hf_lightsam import UsageError


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    model, rows = make_task(case["task"], case.get("num_rows", 32))
    options = {
        "train_sampling_strategy": "sequential",
        "ddp_find_unused_parameters": False,
        "adam_epsilon": 1e-5,  # AdaGrad and Adam scale gradients that are 0 up to rounding up to full size
        **case["options"],
    }
    output = folder / case.get("output", case["name"])
    try:
        trainer = train(output, model, rows=rows, resume=case.get("resume"), **options)
    except UsageError as error:
        return {"error": str(error)}
    state = weights(trainer.accelerator.unwrap_model(trainer.model))
    flat = torch.cat([tensor.flatten() for tensor in state.values()]).unsqueeze(0)
    everywhere = trainer.accelerator.gather(flat)
    return {
        "weights": state,
        "ranks_agree": all(torch.equal(everywhere[0], other) for other in everywhere),
        "logs": [entry for entry in trainer.state.log_history if "sharpness" in entry],
        "eval_losses": [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry],
        "steps": trainer.state.global_step,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_cases(folder, partial(run, folder))
