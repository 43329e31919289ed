"""Launched by test_resume.py: train, and be killed without warning in the sixth step or in writing its checkpoint."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from conftest import make_args, make_bert, make_rows
from test_resume import OPTIONS

from hf_lightsam import LightSAMTrainer


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killed(LightSAMTrainer):
    """Dies in the ascent or in the descent pass of the sixth step, by ``pass_``, or in neither."""

    pass_ = "ascent"

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        is_perturbed = self._sharpness_aware_optimizer().is_perturbed
        if self.state.global_step == 5 and self.pass_ == ("descent" if is_perturbed else "ascent"):
            die()
        return loss


def save_half(state: Any, path: Any, *args: Any, _save: Any = torch.save) -> None:
    _save(state, path, *args)
    if "checkpoint-6" in str(path) and Path(path).name == "optimizer.pt":
        os.truncate(path, Path(path).stat().st_size // 2)
        die()


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, point = Path(sys.argv[1]), sys.argv[2]
    Killed.pass_ = point
    if point == "saving":
        torch.save = save_half
    trainer = Killed(make_bert(), make_args(folder, **OPTIONS), train_dataset=make_rows())
    trainer.train()
