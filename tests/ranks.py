"""Run training cases on several processes, with gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent / "scripts" / "train_cases.py"


def train_on_ranks(folder: Path, num_ranks: int, cases: list[dict[str, Any]]) -> dict[str, Any]:
    """Train all cases in one launch, as starting the processes is what takes time; return their results by name."""
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        [*command, str(SCRIPT), str(folder)], capture_output=True, text=True, env=environment, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(folder / "results.pt", weights_only=False)


def run_cases(folder: Path, run: Callable[[dict[str, Any]], Any]) -> None:
    """In a launched script: run the cases of ``folder``, let rank 0 write the results, and end the process."""
    torch.set_num_threads(1)
    results = {case["name"]: run(case) for case in json.loads((folder / "cases.json").read_text())}
    is_distributed = torch.distributed.is_initialized()
    if not is_distributed or torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    if is_distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # threads of gloo's that are still there now and then abort an interpreter that shuts down
