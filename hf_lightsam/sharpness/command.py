"""Measure how sharp a model's loss is: eigenvalues and trace of the Hessian, m-sharpness, landscapes.

    hf-lightsam sharpness outputs/sst2 --task sst2 --num_rows 256
    hf-lightsam sharpness outputs/adamw --other outputs/lightsam --task cola --data_dir glue --radii 0.01 0.05 0.1
    hf-lightsam sharpness outputs/reviews --train_file reviews.csv --text_columns text --label_column stars

The rows are drawn at random, by --seed, from the training rows (--split validation: the evaluation rows). Prints a
table; in --output_dir: sharpness.md with it, sharpness.json with everything that was measured, sharpness.png. A second
model is measured on the same rows, and so is the line between the weights of both. Under `accelerate launch` each
process takes a share of the rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
import transformers
from torch import nn
from transformers import (
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from .. import __version__
from ..checkpoints import check_output_dir
from ..errors import UsageError, report_usage_errors
from ..glue.arguments import DataArguments, ModelArguments
from ..glue.finetuning import load_model, load_tokenizer
from ..glue.metrics import make_compute_metrics
from ..glue.preprocessing import preprocess
from ..glue.rows import load_requested_rows
from ..glue.suite.rows import choose
from ..glue.suite.store import write_atomically
from ..glue.tasks import TASKS, TextTask
from ..optim.validation import check_count
from ..plots import new_figure
from .connectivity import Connectivity, linear_connectivity
from .draw import draw
from .report import Report, Settings, markdown_table, measure, save

PROGRAM = "hf-lightsam sharpness"


@dataclass
class SharpnessArguments(DataArguments, ModelArguments):
    """Which model, which rows, which measures."""

    model_name_or_path: str = field(default="", metadata={"help": argparse.SUPPRESS})  # is given by its place
    other: str | None = field(
        default=None, metadata={"help": "A second model to measure, of the same form, and the line between both."}
    )
    task_name: str | None = field(
        default=None, metadata={"aliases": ["--task"], "help": f"The GLUE task: {', '.join(TASKS)}."}
    )
    split: Literal["train", "validation"] = field(default="train", metadata={"help": "Which rows to measure on."})
    num_rows: int = field(default=256, metadata={"help": "Rows, drawn at random."})
    batch_size: int = field(default=32, metadata={"help": "Rows at a time; the memory grows with it."})
    top_k: int = field(default=5, metadata={"help": "Largest eigenvalues of the Hessian; 0 for none."})
    num_probes: int = field(default=16, metadata={"help": "Random vectors for the Hessian's trace; 0 for none."})
    radii: list[float] = field(default_factory=lambda: [0.01, 0.05], metadata={"help": "rho of the m-sharpness."})
    adaptive_radii: list[float] = field(
        default_factory=lambda: [0.1, 0.5], metadata={"help": "rho of the adaptive m-sharpness (ASAM)."}
    )
    m: int | None = field(default=None, metadata={"help": "Rows of a group of the m-sharpness. Default: all."})
    num_steps: int = field(default=1, metadata={"help": "Ascent steps of the worst case."})
    num_directions: int = field(default=8, metadata={"help": "Random directions of the average case."})
    moment_rows: int = field(
        default=0, metadata={"help": "Measure the Hessian moments s_2, s_3, s_4 on so many of the rows; slow."}
    )
    num_points: int = field(default=21, metadata={"help": "Points of a landscape along a direction; 0 for none."})
    span: float = field(default=1.0, metadata={"help": "Largest multiple of a landscape's direction."})
    plane: bool = field(default=False, metadata={"help": "A landscape of two directions too: num_points squared."})
    num_vectors: int | None = field(
        default=None, metadata={"help": "Lanczos vectors, each of the size of the weights: fewer need less memory."}
    )
    line_points: int = field(default=11, metadata={"help": "Points on the line to --other, with its ends."})
    seed: int = field(default=0, metadata={"help": "Of the rows, the probes and the directions."})
    output_dir: str = field(default="sharpness_output", metadata={"help": "Folder for table, picture and numbers."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    progress: bool = field(default=True, metadata={"help": "Show progress bars."})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        super().__post_init__()
        for name in ("num_rows", "batch_size"):
            check_count(name, getattr(self, name))
        if self.line_points < 2:
            raise UsageError(f"line_points={self.line_points}: expected at least 2, the ends of the line")
        if self.task_name == "ax":
            raise UsageError("task_name='ax': its rows have no labels; expected another task")
        self.settings = Settings(
            self.top_k,
            self.num_probes,
            tuple(self.radii),
            tuple(self.adaptive_radii),
            self.m,
            self.num_steps,
            self.num_directions,
            self.moment_rows,
            self.num_points,
            self.span,
            self.plane,
            self.num_vectors,
            self.seed,
        )


def parse(argv: Sequence[str], program: str) -> SharpnessArguments:
    """Parse and check a command line.

    Raises:
        UsageError: For values out of range.
        ValueError: For unknown flags.
    """
    parser = HfArgumentParser(
        SharpnessArguments,  # type: ignore[arg-type]
        prog=program,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model_name_or_path", metavar="MODEL", help="a folder, or a name on the hub")
    (arguments,) = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    if arguments.other == arguments.model_name_or_path:
        raise UsageError(f"other={arguments.other!r}: is the model itself; expected another")
    check_output_dir(arguments.output_dir)
    new_figure(1, 1)  # is matplotlib there?
    return arguments


def main(argv: Sequence[str], program: str = PROGRAM) -> None:
    """Run the command.

    Args:
        argv: The arguments after its name.
        program: What messages call it.

    Raises:
        SystemExit: With status 2 for a request that cannot be carried out, after one line that says why.
    """
    with report_usage_errors(program):
        arguments = parse(argv, program)
        args = _runtime(arguments)
        task, raw = load_requested_rows(arguments, args)
        names = [arguments.model_name_or_path, *([] if arguments.other is None else [arguments.other])]
        models = {name: _load(arguments, name, task) for name in names}
        tokenizer = load_tokenizer(arguments)
        split = "train" if args.do_train else task.validation_splits[0]
        rows = choose(raw[split], arguments.num_rows, arguments.seed)
        rows = preprocess(datasets.DatasetDict({split: rows}), task, tokenizer, arguments.max_seq_length)[split]
        batches = _batches(rows, tokenizer, arguments, args)
    try:
        reports, line = _measure(arguments, args, task, models, batches)
        if args.process_index == 0:
            description = {"task": task.name, "split": split, **_made_with(arguments, args)}
            _write(arguments, reports, line, description)
    except UsageError as error:
        with report_usage_errors(program):
            raise error
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _measure(
    arguments: SharpnessArguments,
    args: TrainingArguments,
    task: TextTask,
    models: dict[str, PreTrainedModel],
    batches: list[Any],
) -> tuple[list[Report], Connectivity | None]:
    shared: dict[str, Any] = {
        "distributed": args.world_size > 1,
        "progress": arguments.progress and args.process_index == 0,
    }
    for model in models.values():
        nn.Module.to(model, args.device)
    reports = [measure(name, model, batches, arguments.settings, **shared) for name, model in models.items()]
    if arguments.other is None:
        return reports, None
    first, second = models.values()
    metrics = make_compute_metrics(task)
    options = {"num_points": arguments.line_points, "compute_metrics": metrics, **shared}
    return reports, linear_connectivity(first, second, batches, **options)


def _made_with(arguments: SharpnessArguments, args: TrainingArguments) -> dict[str, Any]:
    return {
        **asdict(arguments.settings),
        "processes": args.world_size,
        "device": str(args.device),
        "hf_lightsam": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _write(
    arguments: SharpnessArguments, reports: list[Report], line: Connectivity | None, description: dict[str, Any]
) -> None:
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown_table(reports, line)
    save(reports, line, description, folder / "sharpness.json")
    write_atomically(folder / "sharpness.md", table + "\n")
    draw(reports, line, folder / "sharpness.png")
    print(table)


def _runtime(arguments: SharpnessArguments) -> TrainingArguments:
    """Return the Trainer's arguments: they join the processes, find the device, and tell which rows are needed."""
    is_train = arguments.split == "train"
    return TrainingArguments(
        output_dir=arguments.output_dir,
        do_train=is_train,
        do_eval=not is_train,
        use_cpu=arguments.use_cpu,
        seed=arguments.seed,
        report_to="none",
    )


def _load(arguments: SharpnessArguments, name: str, task: TextTask) -> PreTrainedModel:
    named = replace(arguments, model_name_or_path=name)
    set_seed(arguments.seed)  # of a new head
    return load_model(named, task, load_tokenizer(named))


def _batches(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    arguments: SharpnessArguments,
    args: TrainingArguments,
) -> list[Any]:
    """Return this process's share of the rows, as micro-batches."""
    padding = "max_length" if arguments.pad_to_max_length else True
    collate, size = DataCollatorWithPadding(tokenizer, padding, arguments.max_seq_length), arguments.batch_size
    starts = range(0, len(rows), size)[args.process_index :: args.world_size]
    known = rows.select_columns([name for name in rows.column_names if name != "idx"])
    return [dict(collate(known.select(range(start, min(start + size, len(rows)))).to_list())) for start in starts]
