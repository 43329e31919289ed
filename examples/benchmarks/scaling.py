"""What does a training step cost over 1, 2 and 4 processes, in time and in bytes sent?

DistributedDataParallel over gloo on CPUs, in the Trainer: a BERT of MiniLM's size, the same rows for each process
however many there are. Methods follow each other in the same processes. Bytes are those that went through the loopback
interface, over all processes, per step; so run it where nothing else uses that. With ``sync_ascent=False`` the ascent
gradient is of each process's own rows, and LightSAM sends what AdamW does.

    python examples/benchmarks/scaling.py
    python examples/benchmarks/scaling.py --table     # the table, from the committed results
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from measure import Timing, add, environment, read
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
    """Measures seconds and bytes sent from the end of one step to that of the next."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where clock and counter are."""
        self.marks.append((time.perf_counter(), sent()))

    def steps(self) -> list[tuple[float, int]]:
        """Return seconds and bytes of each step after the warm-up."""
        marks = self.marks[WARM_UP - 1 :]
        return [(later[0] - earlier[0], later[1] - earlier[1]) for earlier, later in itertools.pairwise(marks)]


def sent() -> int:
    """Return the bytes that have gone through the loopback interface since the system started."""
    counters = psutil.net_io_counters(pernic=True)
    return next(counter.bytes_sent for name, counter in counters.items() if name.startswith("lo"))


def work(arguments: BenchmarkArguments, path: Path) -> None:
    """Train with each method, in one of the processes; the first one leaves the figures."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    steps = WARM_UP + arguments.repetitions
    found = {}
    for name, options in CASES.items():
        model = make_model("MiniLM-L6")
        meter = Meter()
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
        found[name] = meter.steps()
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
        steps = json.loads(path.read_text(encoding="utf-8"))
    settings = {name: getattr(arguments, name) for name in ("batch_size", "length")}
    return {"processes": number, **settings, **environment(torch.device("cpu")), "steps": steps}


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of results in Markdown."""
    lines = []
    for result in sorted(results, key=lambda one: one["processes"]):
        seconds = {name: Timing([step[0] for step in steps]) for name, steps in result["steps"].items()}
        sizes = {name: statistics.median(step[1] for step in steps) for name, steps in result["steps"].items()}
        for name in result["steps"]:
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
    head = ["processes", "", "step, ms", "over AdamW", "sent in a step, MiB", "over AdamW"]
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
