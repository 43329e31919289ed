"""The same rows on one rank, on two, and on two in pieces: the same steps up to rounding."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parent / "scripts" / "train_on_ranks.py"


def run(folder: Path, optim: str, num_ranks: int, batch_size: int, accumulation: int = 1) -> dict[str, Any]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    arguments = [str(SCRIPT), str(folder), optim, str(batch_size), str(accumulation)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "result.pt")


@pytest.mark.parametrize("optim", ["lightsam_adam", "lightsam_adagrad_norm", "sam"])
def test_ranks_change_nothing(tmp_path: Path, optim: str) -> None:
    # SGD moves too little at the tests' learning rate to show much, but shows errors of scale that Adam hides.
    alone = run(tmp_path / "alone", optim, 1, 8)
    for name, options in {"two": (2, 4, 1), "pieces": (2, 2, 2)}.items():
        spread = run(tmp_path / name, optim, *options)
        for key, tensor in alone["weights"].items():
            torch.testing.assert_close(spread["weights"][key], tensor, rtol=1e-4, atol=2e-5, msg=f"{name}: {key}")
        assert spread["sharpness"] == pytest.approx(alone["sharpness"], rel=2e-2, abs=1e-5)
