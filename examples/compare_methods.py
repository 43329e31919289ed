"""Compare sharpness-aware methods with one another and with AdamW, on GLUE tasks, over seeds.

    python examples/compare_methods.py --tasks cola sst2 --seeds 0 1 2 --max_train_samples 512
    python examples/compare_methods.py --methods adamw_torch_fused lightsam_adam sam sam:rho=0.02 --data_dir glue
    python examples/compare_methods.py --table

Each finished run is a line of the CSV file ``--results``; the settings that all runs share are in the JSON file beside
it, the plot in the PNG file. The same command goes on where an interrupted one stopped, and a command with more
methods, tasks or seeds adds those. For a task and seed all methods have the same rows in the same order, the same
initial classifier and the same dropout seed, so that differences are paired by seed. (The LETS methods keep a tenth of
these rows apart to learn their radius on.) Every method gets the one learning rate that is given, and its own default
options unless others are written behind its name.

The standard deviation is that over seeds. The interval of the paired difference is a percentile bootstrap over seeds;
with fewer than four it reaches from the smallest difference to the largest, and covers less than 95 %.

The run in ``examples/results``, the whole family on two CPU cores; ``--table --results ...`` prints it:

    python examples/compare_methods.py --tasks sst2 stsb --seeds 0 1 2 --data_dir glue --max_train_samples 192 \
        --max_eval_samples 300 --max_seq_length 48 --learning_rate 3e-4 --per_device_train_batch_size 8 --threads 1 \
        --results examples/results/compare_methods.csv

It ran as two processes, one a task, beside other work: gradients are exact, times rough. Its settings were chosen by
the time there was and by what AdamW alone did with seed 99, which is not among those reported, on the same development
sets (CoLA stayed at chance there, and STS-B took its place); no method was tuned. It has only 48 steps, so it shows
which methods learn quickly under their default perturbation rather than which generalise best after a full training,
and its one learning rate was AdamW's. No method beats AdamW by more than three seeds can tell, at 1.5 to 3.6 times its
gradients. LightSAM-III and ssam_dynamic come close on SST-2, and are a little below on STS-B; SAM with its default
radius learns far less in these steps, and AdaSAM, mSAM and ESAM stay at chance on SST-2.
"""

from __future__ import annotations

import copy
import csv
import hashlib
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import scipy.stats
import torch
import transformers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    set_seed,
)
from transformers.training_args import OptimizerNames

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.demo.encoder import PACKAGE, packaged_encoder
from hf_lightsam.demo.run import BASELINE
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import TASKS, GlueTask, get_task, load_glue, make_compute_metrics, preprocess
from hf_lightsam.optim.recipes import RECIPES
from hf_lightsam.optim.validation import check_number
from hf_lightsam.plots import new_figure

PROGRAM = "compare_methods.py"
COLUMNS = (
    "task",
    "method",
    "options",
    "seed",
    "metric",
    "score",
    "eval_loss",
    "train_loss",
    "steps",
    "row_gradients",
    "train_seconds",
    "data",
    "settings",
)
"""Of the CSV file. ``row_gradients``: rows whose gradient was taken, over all passes. ``data``: digest of the training
and evaluation rows. ``settings``: digest of the JSON file."""

Key = tuple[str, str, str, int]
"""Task, method, options and seed of a run."""


@dataclass
class CompareArguments:
    """What to compare."""

    methods: list[str] = field(
        default_factory=lambda: ["all"],
        metadata={
            "help": f"all ({BASELINE} and the whole family), or names, each with options if need be, like "
            f"sam:rho=0.02,descent=sgd. Names: {', '.join(RECIPES)}, or an optimizer of transformers."
        },
    )
    tasks: list[str] = field(
        default_factory=lambda: ["cola", "sst2"], metadata={"help": f"GLUE tasks: {', '.join(TASKS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2],
        metadata={"help": "Of the choice and order of the training rows, the classifier and the dropout."},
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A folder, or a name on the hub; it gets a new head. Default: the encoder of the demo."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in GLUE's own TSV layout (CoLA/train.tsv, ...). Default: nyu-mll/glue from the hub."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, chosen at random for each seed. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on so many rows, chosen at random, the same for all runs. Default: all."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    num_train_epochs: float = field(default=2.0, metadata={"help": "Passes over the training rows."})
    per_device_train_batch_size: int = field(default=16, metadata={"help": "Rows a step."})
    learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate after the warm-up; it decays linearly."}
    )
    warmup_steps: float = field(default=0.06, metadata={"help": "Steps of warm-up; below 1, a share of all steps."})
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay."})
    threads: int | None = field(default=None, metadata={"help": "Threads of torch. Default: torch's own number."})
    results: str = field(
        default="outputs/compare_methods.csv",
        metadata={"help": "CSV file that runs are appended to; settings (.json) and plot (.png) are beside it."},
    )
    plot: bool = field(default=True, metadata={"help": "Draw the plot, which needs matplotlib."})
    table: bool = field(default=False, metadata={"help": "Print the table and draw the plot of a file, run nothing."})


@dataclass(frozen=True)
class Method:
    """An optimizer and its options, as ``optim`` and ``optim_args`` take them; no options is the empty text."""

    name: str
    options: str = ""

    @property
    def label(self) -> str:
        """What a command line and the table call it."""
        return f"{self.name}:{self.options}" if self.options else self.name


@dataclass
class Task:
    """A task's rows, not tokenized: those to evaluate on; by seed, those to train on and a digest of all, in order."""

    task: GlueTask
    evaluation: datasets.Dataset
    train: dict[int, datasets.Dataset]
    digests: dict[int, str]


# ---- What was asked for ---------------------------------------------------------------------------------------------


def parse_methods(texts: Sequence[str]) -> list[Method]:
    """Return the methods of a command line, ``all`` spelled out.

    Raises:
        UsageError: For an unknown name, options that the method does not take, or a method twice.
    """
    methods: list[Method] = []
    for text in texts:
        name, _, options = text.partition(":")
        pairs = sorted(pair for pair in options.replace(" ", "").split(",") if pair)
        methods += [Method(each) for each in (BASELINE, *RECIPES)] if text == "all" else [Method(name, ",".join(pairs))]
    known = {*RECIPES, *(member.value for member in OptimizerNames)}
    for method in methods:
        if method.name not in known:
            raise UsageError(
                f"methods={method.label!r}: expected all, or names among {', '.join(RECIPES)}, {BASELINE} and the "
                "other optimizers of transformers"
            )
        if method.options and method.name not in RECIPES:
            raise UsageError(f"methods={method.label!r}: options are for {', '.join(RECIPES)}; expected none")
        if methods.count(method) > 1:
            raise UsageError(f"methods: {method.label!r} is given twice; expected each once")
    return methods


def check(arguments: CompareArguments) -> tuple[list[Method], list[GlueTask]]:
    """Check all arguments before anything is loaded.

    Returns:
        The methods and the tasks.

    Raises:
        UsageError: Naming the argument.
    """
    for name in ("max_train_samples", "max_eval_samples", "max_seq_length", "per_device_train_batch_size", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value!r}: expected a whole number above 0")
    check_number("learning_rate", arguments.learning_rate)
    check_number("weight_decay", arguments.weight_decay)
    if not 0 < arguments.num_train_epochs < math.inf:
        raise UsageError(f"num_train_epochs={arguments.num_train_epochs!r}: expected a number above 0")
    if not 0 <= arguments.warmup_steps < math.inf:
        raise UsageError(f"warmup_steps={arguments.warmup_steps!r}: expected a number that is at least 0")
    tasks = [get_task(name) for name in arguments.tasks]
    for argument, values in (("tasks", [task.name for task in tasks]), ("seeds", arguments.seeds)):
        if len(set(values)) < len(values):
            raise UsageError(f"{argument}={values!r}: expected each once")
    for seed in arguments.seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"seeds={seed!r}: expected whole numbers from 0 to 4294967295")
    methods = parse_methods(arguments.methods)
    with tempfile.TemporaryDirectory() as folder:
        for method in methods:
            try:
                args = training_arguments(arguments, method, 0, folder)
            except UsageError as error:
                raise UsageError(f"methods={method.label!r}: {error}") from None
    if args.world_size > 1:
        raise UsageError(f"WORLD_SIZE={args.world_size}: expected one process, which makes all runs after one another")
    if arguments.model_name_or_path is None:
        packaged_encoder()
    return methods, tasks


def training_arguments(
    arguments: CompareArguments, method: Method, seed: int, output_dir: str
) -> LightSAMTrainingArguments:
    """Return the Trainer's arguments for one run."""
    return LightSAMTrainingArguments(
        output_dir=output_dir,
        optim=method.name,
        optim_args=method.options or None,
        learning_rate=arguments.learning_rate,
        num_train_epochs=arguments.num_train_epochs,
        per_device_train_batch_size=arguments.per_device_train_batch_size,
        per_device_eval_batch_size=64,
        warmup_steps=arguments.warmup_steps,
        weight_decay=arguments.weight_decay,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        dataloader_pin_memory=torch.accelerator.is_available(),
    )


def settings(arguments: CompareArguments) -> dict[str, Any]:
    """Return what all runs of a results file have in common."""
    names = (
        "max_train_samples max_eval_samples max_seq_length num_train_epochs per_device_train_batch_size learning_rate "
        "warmup_steps weight_decay"
    )
    return {
        "model_name_or_path": arguments.model_name_or_path or PACKAGE,
        **{name: getattr(arguments, name) for name in names.split()},
        "device": str(torch.accelerator.current_accelerator() or "cpu"),
        "threads": arguments.threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


# ---- The results file -----------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[dict[str, str]]:
    """Return the lines of a results file; one that was not written to its end, at a kill, does not count.

    Raises:
        UsageError: If it is no file of this program.
    """
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    if lines and lines[0] != ",".join(COLUMNS):
        raise UsageError(f"results={str(path)!r}: its columns are {lines[0]!r}; expected {','.join(COLUMNS)!r}")
    return list(csv.DictReader(lines))


def open_results(path: Path, shared: dict[str, Any]) -> dict[Key, dict[str, str]]:
    """Make a results file ready for more runs.

    Args:
        path: The CSV file.
        shared: The settings.

    Returns:
        The runs that are in it.

    Raises:
        UsageError: If they were made with other settings.
    """
    described = path.with_suffix(".json")
    results = read_results(path) if path.is_file() else []
    if results:
        if not described.is_file():
            raise UsageError(f"results={str(path)!r}: {described.name} is missing beside it, with its settings")
        before = json.loads(described.read_text(encoding="utf-8"))
        changed = [name for name in shared if before.get(name) != shared[name]]
        if changed:
            told = ", ".join(f"{name}={before.get(name)!r}, not {shared[name]!r}" for name in changed)
            raise UsageError(f"results={str(path)!r}: made with {told}; expected the same settings, or another file")
        if {result["settings"] for result in results} != {_digest(shared)}:
            raise UsageError(f"results={str(path)!r}: some lines were made with other settings than {described.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(shared, indent=1) + "\n", encoding="utf-8")
    if not path.is_file() or not path.read_bytes().startswith(",".join(COLUMNS).encode() + b"\n"):
        path.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    with path.open("rb+") as file:
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
    return {(line["task"], line["method"], line["options"], int(line["seed"])): line for line in results}


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Add a run to the file, on the disk before this returns."""
    with path.open("a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(result)
        file.flush()
        os.fsync(file.fileno())


# ---- The runs -------------------------------------------------------------------------------------------------------


def load_task(task: GlueTask, arguments: CompareArguments) -> Task:
    """Load a task's rows and choose those that are asked for."""
    split = task.validation_splits[0]
    raw = load_glue(task, arguments.data_dir, splits=["train", split])

    def chosen(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
        shuffled = rows.shuffle(seed=seed)
        return shuffled if limit is None else shuffled.select(range(min(limit, len(rows))))

    columns = (*task.text_columns, "label")
    evaluation = chosen(raw[split], arguments.max_eval_samples, 0)
    train = {seed: chosen(raw["train"], arguments.max_train_samples, seed) for seed in arguments.seeds}
    digests = {
        seed: _digest([part[name][:] for part in (rows, evaluation) for name in columns])
        for seed, rows in train.items()
    }
    return Task(task, evaluation, train, digests)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer, with something to pad by."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except OSError as error:
        raise UsageError(f"model_name_or_path={source!r}: {error}") from error
    if tokenizer.pad_token is None:  # decoders have none; batches need one
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: str, task: GlueTask, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Load the model that all methods of a seed start from."""
    set_seed(seed)  # the classifier's initial weights
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_labels=task.num_labels, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError) as error:
        raise UsageError(f"model_name_or_path={source!r}: {error}") from error
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


class GradientCounter:
    """Counts the rows whose gradient is taken, in every pass of whatever method.

    Args:
        model: Its output has ``logits``, one line a row.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.rows = 0
        model.register_forward_hook(self._watch)

    def _watch(self, model: Any, inputs: Any, output: Any) -> None:
        if output.logits.requires_grad:
            output.logits.register_hook(self._count)

    def _count(self, gradient: torch.Tensor) -> None:
        self.rows += len(gradient)


def run(
    model: PreTrainedModel,
    args: LightSAMTrainingArguments,
    task: GlueTask,
    rows: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Train and evaluate once.

    Returns:
        The columns that a run itself gives.
    """
    trainer = LightSAMTrainer(
        model,
        args,
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=make_compute_metrics(task),
    )
    trainer.remove_callback(PrinterCallback)
    counter = GradientCounter(model)
    start = time.perf_counter()
    trained = trainer.train()
    seconds = time.perf_counter() - start
    metrics = trainer.evaluate()
    metric = task.metrics[0]
    return {
        "metric": metric,
        "score": round(metrics[f"eval_{metric}"], 6),
        "eval_loss": round(metrics["eval_loss"], 6),
        "train_loss": round(trained.training_loss, 6),
        "steps": trained.global_step,
        "row_gradients": counter.rows,
        "train_seconds": round(seconds, 2),
    }


def run_all(
    arguments: CompareArguments,
    methods: Sequence[Method],
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    done: dict[Key, dict[str, str]],
) -> None:
    """Make the runs that are not done; seed by seed, so that what an interrupted comparison has is balanced."""
    path, source = Path(arguments.results), str(arguments.model_name_or_path or packaged_encoder())
    shared = _digest(settings(arguments))
    total = len(arguments.seeds) * len(tasks) * len(methods)
    with tqdm(total=total, unit="run") as bar, tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            for task in tasks:
                name = task.task.name
                keys: dict[Method, Key] = {each: (name, each.name, each.options, seed) for each in methods}
                missing = [method for method in methods if keys[method] not in done]
                bar.update(len(methods) - len(missing))
                if not missing:
                    continue
                raw = datasets.DatasetDict({"train": task.train[seed], "validation": task.evaluation})
                rows = preprocess(raw, task.task, tokenizer, arguments.max_seq_length)
                start = load_model(source, task.task, tokenizer, seed)
                for method in missing:
                    bar.set_postfix_str(f"{name}, seed {seed}, {method.label}")
                    args = training_arguments(arguments, method, seed, folder)
                    result = run(copy.deepcopy(start), args, task.task, rows, tokenizer)
                    identity = dict(zip(("task", "method", "options", "seed"), keys[method], strict=True))
                    append_result(path, {**identity, **result, "data": task.digests[seed], "settings": shared})
                    bar.update()


def refuse_other_rows(path: Path, tasks: Sequence[Task], done: dict[Key, dict[str, str]]) -> None:
    """Refuse data that are not those of the runs that are there.

    Raises:
        UsageError: Naming task and seed.
    """
    for task in tasks:
        for seed, digest in task.digests.items():
            before = {line["data"] for key, line in done.items() if (key[0], key[3]) == (task.task.name, seed)}
            if before and before != {digest}:
                raise UsageError(
                    f"results={str(path)!r}: its runs of {task.task.name} with seed {seed} had other rows than those "
                    "of data_dir; expected the same data, or another file"
                )


# ---- What came out --------------------------------------------------------------------------------------------------


@dataclass
class Summary:
    """What the seeds of one method on one task gave, and how it differs from the baseline's, seed by seed."""

    label: str
    metric: str
    scores: list[float]
    losses: list[float]
    differences: list[float]
    gradients: list[float]
    times: list[float]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return statistics.fmean(self.scores)

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores over seeds; NaN for one."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else math.nan

    def interval(self) -> tuple[float, float]:
        """Return the interval of the mean paired difference: percentile bootstrap over seeds, NaN for one."""
        if len(self.differences) < 2:
            return math.nan, math.nan
        found = scipy.stats.bootstrap((self.differences,), np.mean, method="percentile", rng=0).confidence_interval
        return float(found.low), float(found.high)


def summarize(results: Sequence[dict[str, str]]) -> dict[str, list[Summary]]:
    """Return the summaries of each task, the best mean first."""
    by_method: dict[tuple[str, str], dict[int, dict[str, str]]] = {}
    for line in results:
        label = Method(line["method"], line["options"]).label
        by_method.setdefault((line["task"], label), {})[int(line["seed"])] = line
    tasks: dict[str, list[Summary]] = {}
    for (task, label), lines in by_method.items():
        baseline = by_method.get((task, BASELINE), {})
        pairs = [(lines[seed], baseline[seed]) for seed in lines if seed in baseline]

        def ratios(column: str, pairs: list[Any] = pairs) -> list[float]:
            return [float(own[column]) / float(other[column]) for own, other in pairs]

        summary = Summary(
            label,
            next(iter(lines.values()))["metric"],
            [float(line["score"]) for line in lines.values()],
            [float(line["eval_loss"]) for line in lines.values()],
            [float(own["score"]) - float(other["score"]) for own, other in pairs],
            ratios("row_gradients"),
            ratios("train_seconds"),
        )
        tasks.setdefault(task, []).append(summary)
    return {task: sorted(summaries, key=lambda each: -each.mean) for task, summaries in tasks.items()}


def table(results: Sequence[dict[str, str]]) -> str:
    """Return a Markdown table for each task."""
    parts = []
    for task, summaries in summarize(results).items():
        lines = [
            f"### {task}, {summaries[0].metric}",
            "",
            f"| method | seeds | mean | sd | median | difference to {BASELINE} [95 %] | eval loss | gradients | time |",
            "|---" + "|---:" * 8 + "|",
        ]
        for each in summaries:
            numbers = [each.mean, each.deviation, statistics.median(each.scores)]
            difference = "-"
            if each.differences and each.label != BASELINE:
                difference = f"{statistics.fmean(each.differences):+.3f}"
                difference += "" if len(each.differences) < 2 else " [{:+.3f}, {:+.3f}]".format(*each.interval())
            costs = [statistics.median(ratios) if ratios else math.nan for ratios in (each.gradients, each.times)]
            cells = [each.label, str(len(each.scores)), *(_number(value, 3) for value in numbers), difference]
            cells += [_number(statistics.fmean(each.losses), 3), *(_number(value, 2) for value in costs)]
            lines.append("| " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def draw(results: Sequence[dict[str, str]], path: Path) -> None:
    """Draw mean and standard deviation of each method, and its seeds, one panel a task.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    tasks = summarize(results)
    rows = max(len(summaries) for summaries in tasks.values())
    figure = new_figure(4.6 * len(tasks), 1.3 + 0.27 * rows)
    for axes, (task, summaries) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for place, each in enumerate(reversed(summaries)):
            color = "#D55E00" if each.label == BASELINE else "#0072B2"
            axes.plot(each.scores, [place - 0.25] * len(each.scores), "o", color=color, alpha=0.4, ms=4, mew=0)
            deviation = 0.0 if math.isnan(each.deviation) else each.deviation
            axes.errorbar(each.mean, place, xerr=deviation, fmt="D", color=color, ms=5, capsize=3, lw=1.2)
            if each.label == BASELINE:
                axes.axvline(each.mean, color=color, ls=":", lw=1, zorder=0)
        axes.set_yticks(range(len(summaries)), [each.label for each in reversed(summaries)], fontsize=8)
        axes.set_xlabel(summaries[0].metric.replace("_", " "))
        axes.set_title(task, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, axis="x")
    figure.suptitle(
        "Mean over seeds ± standard deviation; faint: each seed; dotted: the mean of " + BASELINE, fontsize=9
    )
    figure.savefig(path, dpi=130)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the flags ask for.

    Args:
        argv: The command line after the program's name. Default: that of the process.
    """
    with report_usage_errors(PROGRAM):
        parser = HfArgumentParser(CompareArguments, prog=PROGRAM, description=__doc__)  # type: ignore[arg-type]
        (arguments,) = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
        path = Path(arguments.results)
        if path.suffix != ".csv":
            raise UsageError(f"results={arguments.results!r}: expected the name of a .csv file")
        if arguments.plot:
            new_figure(1.0, 1.0)  # fails now where matplotlib is not installed
        if arguments.table and not (path.is_file() and read_results(path)):
            raise UsageError(f"results={arguments.results!r}: expected a file that holds runs")
        make_runs = None if arguments.table else _set_up(arguments)
    if make_runs is not None:
        make_runs()
    results = read_results(path)
    print(table(results))
    if arguments.plot:
        draw(results, path.with_suffix(".png"))


def _set_up(arguments: CompareArguments) -> Callable[[], None]:
    """Check and load what the runs need, and return what makes them: an error there is no error of the user's."""
    methods, glue_tasks = check(arguments)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    path, source = Path(arguments.results), str(arguments.model_name_or_path or packaged_encoder())
    tasks = [load_task(task, arguments) for task in glue_tasks]
    tokenizer = load_tokenizer(source)
    load_model(source, glue_tasks[0], tokenizer, 0)
    done = open_results(path, settings(arguments))
    refuse_other_rows(path, tasks, done)
    return partial(run_all, arguments, methods, tasks, tokenizer, done)


if __name__ == "__main__":
    main()
