"""Run scripts, and training cases, on several processes with gloo."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).parent / "scripts" / "train_cases.py"

FORKS: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
"""Processes that begin with everything imported, which is what takes time."""

FORKS.set_forkserver_preload(
    [
        "hf_lightsam.glue.suite.command",
        "hf_lightsam.loop",
        "transformers.trainer",
        "transformers.models.bert.modeling_bert",
        "torch.distributed.fsdp",
    ]
)


FSDP2_ON_CPUS = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "BertLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "HF_LIGHTSAM_TEST_DEVICE": "cpu",
}
"""What ``accelerate launch`` tells processes with the configuration of ``engines.py``, and where they train."""


def start_script(script: Path, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Any:
    """Start a script in a process of its own, as ``python script arguments`` here, with ``environment`` and its
    output in a file; what the script imports is there already."""
    places = (os.getcwd(), str(script), list(arguments), str(log), dict(environment))
    process = FORKS.Process(target=_run_script, args=places)
    process.start()
    return process


def _run_script(folder: str, script: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    tempfile.tempdir = None  # to be found anew, by what the environment says
    write_output_to(log)
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).parent))
    torch.set_num_threads(1)
    runpy.run_path(script, run_name="__main__")


def write_output_to(log: str | Path) -> None:
    """Send what this process prints into a file."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)


def launch(
    script: Path,
    folder: Path,
    num_ranks: int,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    timeout: float = 500.0,
) -> str:
    """Run a script on so many processes of this machine, as torchrun would: one that fails ends the others.

    Args:
        script: Gets ``arguments``, and what torchrun puts into the environment.
        folder: Where the processes' outputs go.
        num_ranks: Processes.
        *arguments: Of the script.
        environment: More of it.
        timeout: Seconds.

    Returns:
        What the processes printed.

    Raises:
        AssertionError: With the output of all processes, if one of them failed or did not end.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.getsockname()[1])}
    settings = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", "LOCAL_WORLD_SIZE": str(num_ranks)}
    shared = {**os.environ, **settings, **address, "WORLD_SIZE": str(num_ranks), **(environment or {})}
    logs = [folder / f"rank{rank}.log" for rank in range(num_ranks)]
    processes = [
        start_script(script, arguments, log, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, log in enumerate(logs)
    ]
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if time.monotonic() > end or any(process.exitcode for process in processes):
            break
        time.sleep(0.02)
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()
    told = [log.read_text() if log.exists() else "" for log in logs]
    ends = "\n".join(f"--- rank {rank}:\n{text[-4000:]}" for rank, text in enumerate(told))
    assert [process.exitcode for process in processes] == [0] * num_ranks, ends
    return "".join(told)


def train_on_ranks(
    folder: Path, num_ranks: int, cases: list[dict[str, Any]], script: Path | None = None, **options: Any
) -> dict[str, Any]:
    """Run all cases of a script (:data:`SCRIPT` if none is given) in one launch; return their results by name.

    Options are :func:`launch`'s.
    """
    folder.mkdir(exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    launch(script or SCRIPT, folder, num_ranks, str(folder), **options)
    return torch.load(folder / "results.pt", weights_only=False)


def run_cases(folder: Path, run: Callable[[dict[str, Any]], Any]) -> None:
    """In a launched script: run the cases of ``folder``, let rank 0 write the results, and end the process."""
    torch.set_num_threads(1)
    gc.freeze()  # every Trainer collects garbage: what the imports made need not be looked through each time
    results = {case["name"]: run(case) for case in json.loads((folder / "cases.json").read_text())}
    is_distributed = torch.distributed.is_initialized()
    if not is_distributed or torch.distributed.get_rank() == 0:
        torch.save(results, folder / "results.pt")
    if is_distributed:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # threads of gloo's that are still there now and then abort an interpreter that shuts down
