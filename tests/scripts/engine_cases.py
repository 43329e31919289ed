"""Launched by torchrun or ``accelerate launch``: train each case of a JSON file under the engine that was launched.

Like ``train_cases.py``, but on the device that ``HF_LIGHTSAM_TEST_DEVICE`` names and also under FSDP2: the weights that
are written are whole ones, and all ranks' are compared bit for bit after every step. A case's ``environment`` sets what
Accelerate reads anew for each Trainer.
"""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import make_args
from processes import run_cases
from tasks import make_task
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from hf_lightsam import LightSAMTrainer, UsageError
from hf_lightsam.glue.dry_run import fsdp_on_cpus

IS_ON_CPU = os.environ["HF_LIGHTSAM_TEST_DEVICE"] == "cpu"


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


class Watch(TrainerCallback):
    """Compares the ranks' weights after every step; under FSDP2 those that they gather."""

    def __init__(self) -> None:
        self.agree = True
        self.sharded = False

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        assert model is not None
        self.sharded = any(isinstance(p, DTensor) for p in model.parameters())
        flat = torch.cat([whole(p).flatten() for p in model.parameters()]).to(args.device)
        self.agree &= bool(flat.isfinite().all())
        if torch.distributed.is_initialized():
            everywhere = [torch.empty_like(flat) for _ in range(args.world_size)]
            torch.distributed.all_gather(everywhere, flat)
            self.agree &= all(torch.equal(flat, other) for other in everywhere)


def run(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    os.environ.update(case.get("environment", {}))
    model, rows = make_task(case["task"], case.get("num_rows", 32))
    options = {
        "train_sampling_strategy": "sequential",
        "adam_epsilon": 1e-5,  # AdaGrad and Adam scale gradients that are 0 up to rounding up to full size
        "use_cpu": IS_ON_CPU,
        **case["options"],
    }
    watch = Watch()
    try:
        args = make_args(folder / case.get("output", case["name"]), **options)
        trainer = LightSAMTrainer(model, args, train_dataset=rows, eval_dataset=rows[:8], callbacks=[watch])
        trainer.train(resume_from_checkpoint=case.get("resume"))
    except UsageError as error:
        return {"error": str(error)}
    unwrapped = trainer.accelerator.unwrap_model(trainer.model)
    scaler = trainer.accelerator.scaler
    return {
        "weights": {name: whole(tensor) for name, tensor in unwrapped.state_dict().items()},
        "ranks_agree": watch.agree,
        "sharded": watch.sharded,
        "engine": str(trainer.accelerator.distributed_type),
        "device": trainer.args.device.type,
        "world_size": trainer.args.world_size,
        "scaler": None if scaler is None else scaler.state_dict(),
        "logs": [entry for entry in trainer.state.log_history if "sharpness" in entry],
        "steps": trainer.state.global_step,
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    with fsdp_on_cpus() if IS_ON_CPU else nullcontext():
        run_cases(folder, partial(run, folder))
