"""What does a training step cost over 1, 2 and 4 processes, in time and in bytes sent?

DistributedDataParallel over gloo on CPUs, in the Trainer: a BERT of MiniLM's size, the same rows for each process
however many there are. Methods follow each other in the same processes. Bytes are those of the tensors that a process
hands to collectives in a step, as torch's profiler tells them, in steps after those that are timed. With
``sync_ascent=False`` the ascent gradient is of each process's own rows, and LightSAM sends what AdamW does.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --table     # the table, from the committed results
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from measure import Timing, add, environment, read, trace
from training_step import make_model, make_rows
from transformers import HfArgumentParser, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue.suite.tables import markdown

RESULTS = Path(__file__).parent / "results" / "scaling.json"
BASELINE = "AdamW (fused)"
CASES: Mapping[str, Mapping[str, Any]] = {
    BASELINE: {"optim": "adamw_torch_fused"},
    "LightSAM-Adam": {"optim": "lightsam_adam"},
    "LightSAM-Adam, ascent not synchronised": {"optim": "lightsam_adam", "sync_ascent": False},
}
WARM_UP = 4
PROFILED = 2
"""Steps after the measured ones, whose communication is counted."""

BYTES = {"float": 4, "double": 8, "c10::BFloat16": 2, "c10::Half": 2, "long": 8, "long int": 8, "int": 4, "bool": 1}
"""Size of an element by its name in a profile."""


@dataclass
class BenchmarkArguments:
    """What to measure."""

    processes: list[int] = field(default_factory=lambda: [1, 2, 4], metadata={"help": "Numbers of processes."})
    batch_size: int = field(default=4, metadata={"help": "Rows of a step and process."})
    length: int = field(default=32, metadata={"help": "Tokens of each row."})
    repetitions: int = field(default=8, metadata={"help": "Steps that are measured."})
    results: str = field(default=str(RESULTS), metadata={"help": "JSON file; runs of the same kind are replaced."})
    worker: str | None = field(default=None, metadata={"help": "Of this script's own: where a process leaves figures."})
    table: bool = field(default=False, metadata={"help": "Print the results that are there; measure nothing."})

    def __post_init__(self) -> None:
        for name in ("batch_size", "length", "repetitions"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)!r}: expected at least 1")
        for number in self.processes:
            if number < 1:
                raise UsageError(f"processes={number!r}: expected numbers of at least 1")


class Meter(TrainerCallback):
    """Measures the seconds of each step, from the end of one to that of the next, and then the bytes of some more.

    Args:
        repetitions: Steps that are timed, after the warm-up.
    """

    def __init__(self, repetitions: int) -> None:
        self.last = WARM_UP + repetitions
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
        self._marks: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, or start the profile."""
        if state.global_step <= self.last:
            self._marks.append(time.perf_counter())
        if state.global_step == self.last:
            self.profiler.start()
        elif state.global_step == self.last + PROFILED:
            self.profiler.stop()

    def figures(self) -> dict[str, Any]:
        """Return ``seconds`` of the timed steps and ``bytes`` of a step."""
        seconds = [later - earlier for earlier, later in itertools.pairwise(self._marks[WARM_UP - 1 :])]
        return {"seconds": seconds, "bytes": sum(map(handed_over, trace(self.profiler)["traceEvents"])) / PROFILED}


def handed_over(event: dict[str, Any]) -> int:
    """Return the bytes that an event of a profile hands to a collective of gloo's or NCCL's; 0 for other events."""
    if not str(event.get("name", "")).startswith(("gloo:", "nccl:")):
        return 0
    args = event.get("args", {})
    tensors = zip(args.get("Input Dims", ()), args.get("Input type", ()), strict=False)
    return sum(math.prod(dims) * BYTES[kind] for dims, kind in tensors if kind in BYTES)


def work(arguments: BenchmarkArguments, path: Path) -> None:
    """Train with each method, in one of the processes; the first one leaves the figures."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    steps = WARM_UP + arguments.repetitions + PROFILED
    found = {}
    for name, options in CASES.items():
        model = make_model("MiniLM-L6")
        meter = Meter(arguments.repetitions)
        with tempfile.TemporaryDirectory() as folder:
            args = LightSAMTrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=arguments.batch_size,
                max_steps=steps,
                logging_steps=10 * steps,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                ddp_backend="gloo",
                ddp_find_unused_parameters=False,
                **options,
            )
            rows = make_rows(arguments.batch_size * steps * args.world_size, arguments.length, model.config.vocab_size)
            trainer = LightSAMTrainer(model, args, train_dataset=rows, callbacks=[meter])
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        found[name] = meter.figures()
        if dist.is_initialized():
            dist.barrier()
    if int(os.environ.get("RANK", 0)) == 0:
        path.write_text(json.dumps(found), encoding="utf-8")


def measure(arguments: BenchmarkArguments, number: int) -> dict[str, Any]:
    """Launch so many processes; return what goes into the result file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        flags = [f"--{name}={getattr(arguments, name)}" for name in ("batch_size", "length", "repetitions")]
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}"]
        subprocess.run([sys.executable, *launch, __file__, *flags, f"--worker={path}"], check=True)
        figures = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: getattr(arguments, name) for name in ("batch_size", "length")}
    return {"processes": number, **settings, **environment(torch.device("cpu")), "figures": figures}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of results in Markdown."""
    lines = []
    for result in sorted(results, key=lambda one: one["processes"]):
        seconds = {name: Timing(one["seconds"]) for name, one in result["figures"].items()}
        sizes = {name: one["bytes"] for name, one in result["figures"].items()}
        for name in result["figures"]:
            is_alone = result["processes"] == 1
            lines.append(
                [
                    str(result["processes"]),
                    name,
                    f"{1e3 * seconds[name].median:.0f}",
                    f"{seconds[name].median / seconds[BASELINE].median:.2f}",
                    "" if is_alone else f"{sizes[name] / 2**20:.1f}",
                    "" if is_alone else f"{sizes[name] / sizes[BASELINE]:.3f}",
                ]
            )
    head = ["processes", "", "step, ms", "over AdamW", "to collectives in a step, MiB", "over AdamW"]
    return markdown(head, lines, numbers_from=2)


def main(argv: list[str] | None = None) -> None:
    """Run what the flags ask for."""
    with report_usage_errors("scaling.py", (UsageError,)):
        (arguments,) = HfArgumentParser(BenchmarkArguments, description=__doc__).parse_args_into_dataclasses(argv)  # type: ignore[arg-type]
        if arguments.worker:
            work(arguments, Path(arguments.worker))
            return
        if not arguments.table:
            for number in arguments.processes:
                add(arguments.results, measure(arguments, number), ("processes", "batch_size", "length", "hardware"))
        print(table(read(arguments.results)))


if __name__ == "__main__":
    main()
