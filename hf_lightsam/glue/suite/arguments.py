"""What a suite is asked for: its command line, checked as a whole before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers import HfArgumentParser, TrainingArguments

from ... import __version__
from ...checkpoints import check_output_dir
from ...demo.encoder import PACKAGE, packaged_encoder
from ...errors import UsageError
from ...optim.recipes import RECIPES
from ...optim.validation import check_number
from ...passes import CheaperAscent
from ...training_args import LightSAMTrainingArguments
from ..arguments import ModelArguments
from ..recipe import Recipe, load_recipe
from ..tasks import TASKS, GlueTask, get_task
from .methods import BASELINE, Method, parse_method, parse_methods, sorted_options
from .rows import digest

DEFAULTS: dict[str, Any] = {
    "output_dir": "glue_output",
    "per_device_eval_batch_size": 64,
    "save_strategy": "steps",
    "save_steps": 200,
    "save_total_limit": 1,
    "logging_steps": 50,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level_replica": "error",
    "average_tokens_across_devices": False,
    "learning_rate": 5e-5,
}
"""Where a suite's default differs from the Trainer's. ``average_tokens_across_devices``: with it the Trainer multiplies
the loss by the number of processes (transformers 5.24), which is wrong for models whose loss is a mean over rows, as
those of classification are, and would clip the baseline's gradients otherwise than those of the family.
``learning_rate``: one for all methods, where forms I and II of LightSAM have another default."""

_HELP = {
    "learning_rate": "Peak learning rate of all methods. (lightsam_adagrad and lightsam_adagrad_norm, whose steps "
    "shrink as they go on, want ten times the default.)"
}
"""Where a default is another, what ``--help`` says of it too."""

_CHEAPER = tuple(f"ascent_{each.name}" for each in dataclasses.fields(CheaperAscent))
_RUN_FIELDS = ("replay_rng", "sync_ascent", "validation_fraction", "saved_weights", "ascent_kernels", *_CHEAPER)
"""Fields of :class:`LightSAMTrainingArguments` that are no options of an optimizer."""

_OPTIONS = tuple(
    each.name
    for each in dataclasses.fields(LightSAMTrainingArguments)
    if each.name not in {other.name for other in dataclasses.fields(TrainingArguments)} | set(_RUN_FIELDS)
)
"""The typed fields that are options of an optimizer."""

_REFUSED = {
    "seed": "expected --seeds",
    "data_seed": "expected --seeds, each of which also orders the rows",
    "resume_from_checkpoint": "expected none: the same command goes on where it was interrupted",
    "push_to_hub": "expected none: a suite has many models",
}

_ALWAYS_TOLD = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "fp16",
)
"""Training settings that are written down also where they are the defaults of a suite."""

_WITHOUT_EFFECT = {
    *("optim", "optim_args", "output_dir", "seed", "data_seed", "use_cpu", "local_rank", "debug", "project"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_level", "log_level_replica", "log_on_each_node"),
    *("disable_tqdm", "report_to", "run_name", "skip_memory_metrics", "include_num_input_tokens_seen"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "hub_token", "hub_model_id"),
    *("save_strategy", "save_steps", "save_total_limit", "save_only_model", "save_on_each_node"),
    *("enable_jit_checkpoint", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_in_order"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "do_train", "do_eval", "do_predict"),
    "saved_weights",
}
"""Training arguments that say nothing about what a model learns; a suite may be continued with others."""


@dataclass
class SuiteArguments(ModelArguments):
    """Which tasks, methods and seeds, and on how much of the data. What methods are compared is ``--optim``."""

    model_name_or_path: str = field(
        default=PACKAGE,
        metadata={
            "aliases": ["--model"],
            "help": f"A folder, or a name on the hub. {PACKAGE} is the encoder that the extra [demo] installs.",
        },
    )
    ignore_mismatched_sizes: bool = field(
        default=True, metadata={"help": "Replace a classification head of another size by a new one."}
    )
    tasks: list[str] = field(default_factory=lambda: ["all"], metadata={"help": f"all, or some of {', '.join(TASKS)}."})
    seeds: list[int] = field(
        default_factory=lambda: [5],
        metadata={
            "help": "One number N: the seeds 0 to N-1. Several numbers: these seeds. A seed chooses and orders the "
            "training rows and draws the new head and the dropout, the same for all methods."
        },
    )
    baseline: str = field(
        default=BASELINE,
        metadata={
            "help": "What --optim is compared with on the same tasks and seeds, with options if need be, like "
            "sam:rho=0.02,descent=sgd; none for no comparison."
        },
    )
    methods: list[str] = field(
        default_factory=list,
        metadata={"help": f"Further methods, written like the baseline; all: {BASELINE} and the whole family."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in GLUE's own TSV layout (CoLA/train.tsv, ...). Default: nyu-mll/glue from the hub."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on so many rows, chosen at random for each seed. Default: all."}
    )
    max_eval_samples: int | None = field(
        default=None,
        metadata={"help": "So many rows of each development split, chosen at random once for all runs. Default: all."},
    )
    sharpness_samples: int = field(
        default=128,
        metadata={
            "help": "Measure the sharpness before and after training on so many training rows, the first of each "
            "seed; 0 for none."
        },
    )
    submission: bool = field(
        default=False,
        metadata={
            "help": "Predict the test rows with --optim and write submission.zip for the GLUE server, of each task's "
            "seed with the best development score. Needs all nine tasks."
        },
    )
    keep_models: Literal["none", "best", "all"] = field(
        default="none", metadata={"help": "Keep trained models: none, each task's and method's best seed, or all."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "YAML file with settings for each task; flags given here go before it."}
    )
    threads: int | None = field(default=None, metadata={"help": "Threads of torch. Default: torch's own number."})
    table: bool = field(
        default=False,
        metadata={"help": "Print the tables of output_dir, with its own baseline if none is given; run nothing."},
    )


_SUITE_FIELDS = tuple(each.name for each in dataclasses.fields(SuiteArguments))


@dataclass(frozen=True)
class Request:
    """A checked command line.

    Attributes:
        arguments: The suite's own arguments.
        tasks: In GLUE's order.
        seeds: Each once.
        methods: The baseline first, if there is one, then the studied method, then the further ones.
        studied: The method of ``--optim``; None where all are alike.
        baseline: What it is compared with; None for no comparison.
        given: What the command line has, without defaults.
        recipe: Settings by task, behind those of the command line.
    """

    arguments: SuiteArguments
    tasks: tuple[GlueTask, ...]
    seeds: tuple[int, ...]
    methods: tuple[Method, ...]
    studied: Method | None
    baseline: Method | None
    given: dict[str, Any]
    recipe: Recipe | None

    @property
    def output_dir(self) -> Path:
        """Where everything is written."""
        return Path(self.given.get("output_dir", DEFAULTS["output_dir"]))

    def max_seq_length(self, task: GlueTask) -> int:
        """Return the tokens at most of a task's rows."""
        settings = {**_of_task(self.recipe, task), **self.given}
        return int(settings.get("max_seq_length", self.arguments.max_seq_length))

    def training_arguments(
        self, task: GlueTask, method: Method, seed: int, output_dir: str | Path
    ) -> LightSAMTrainingArguments:
        """Return the Trainer's arguments for one run.

        Raises:
            UsageError: For values that are out of range.
        """
        pinned = {"dataloader_pin_memory": torch.accelerator.is_available()}
        values = {**DEFAULTS, **pinned, **_of_task(self.recipe, task), **self.given}
        dropped = {*_SUITE_FIELDS, *_OPTIONS, "optim", "optim_args"}
        if method.name not in RECIPES or not RECIPES[method.name].optimizer.plan_class.needs_validation:
            dropped.add("validation_fraction")  # the other methods refuse it
        if method.name not in RECIPES or RECIPES[method.name].optimizer.reads_saved_weights:
            dropped.add("saved_weights")
        if "ascent_kernels" in values and not _has_native_ascent(method):
            dropped.add("ascent_kernels")
        possible = RECIPES[method.name].optimizer.plan_class.cheaper_options if method.name in RECIPES else ()
        dropped |= set(_CHEAPER) - {f"ascent_{name}" for name in possible}  # likewise
        values = {name: value for name, value in values.items() if name not in dropped}
        values |= {"output_dir": str(output_dir), "seed": seed}
        return LightSAMTrainingArguments(optim=method.name, optim_args=method.options or None, **values)

    def settings(self) -> dict[str, Any]:
        """Return what the runs are made with.

        Returns:
            ``optim`` and ``baseline``: labels of the methods; ``shared``: settings of all runs; ``tasks``: further ones
            of each task. All runs in a folder agree in the latter two.
        """
        arguments = self.arguments
        names = ("tokenizer_name", "model_revision", "max_train_samples", "max_eval_samples", "sharpness_samples")
        first = self.training_arguments(self.tasks[0], self.methods[0], 0, self.output_dir)
        shared = {
            "model_name_or_path": arguments.model_name_or_path,
            **{name: getattr(arguments, name) for name in names},
            "device": str(first.device.type),
            "processes": first.world_size,
            "threads": arguments.threads or torch.get_num_threads(),
            "hf_lightsam": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        return {
            "optim": None if self.studied is None else self.studied.label,
            "baseline": None if self.baseline is None else self.baseline.label,
            "shared": shared,
            "tasks": {task.name: self._task_settings(task) for task in self.tasks},
        }

    def _task_settings(self, task: GlueTask) -> dict[str, Any]:
        training = self.training_arguments(task, self.methods[0], 0, self.output_dir)
        args = training.to_dict()
        # With the same device: the last training arguments that are made set it up, and join the processes.
        plain = LightSAMTrainingArguments(optim=BASELINE, use_cpu=training.use_cpu, **DEFAULTS).to_dict()
        told = {
            name: value
            for name, value in args.items()
            if name in _ALWAYS_TOLD or (name not in {*_WITHOUT_EFFECT, *_OPTIONS} and value != plain[name])
        }
        of_some = ("validation_fraction", "ascent_kernels", *_CHEAPER)  # which the first method may be without
        told |= {name: self.given[name] for name in of_some if self.given.get(name) is not None}
        return {"max_seq_length": self.max_seq_length(task), **told}


def settings_digest(settings: dict[str, Any], task: str) -> str:
    """Return the digest of one task's settings, those shared by all tasks included."""
    return digest([settings["shared"], settings["tasks"][task]])


def parse(argv: Sequence[str], program: str, description: str | None = None) -> Request:
    """Parse and check a command line.

    Args:
        argv: The arguments after the program's name.
        program: Its name.
        description: What ``--help`` begins with.

    Raises:
        UsageError: Naming the argument, its value and what is accepted.
        ValueError: For unknown flags.
    """
    parser = HfArgumentParser(
        (SuiteArguments, LightSAMTrainingArguments),  # type: ignore[arg-type]
        prog=program,
        usage=f"{program} [--flag VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    for action in parser._actions:  # for --help; set_defaults() would put them among the flags that are given
        action.default = DEFAULTS.get(action.dest, action.default)
        action.help = _HELP.get(action.dest, action.help)
    given = _given(parser, argv)
    recipe = load_recipe(given["recipe"], parser) if given.get("recipe") else None
    common = {} if recipe is None else _common(recipe)
    arguments = SuiteArguments(**{name: value for name, value in (common | given).items() if name in _SUITE_FIELDS})
    for values in (common | given, *(recipe.tasks.values() if recipe is not None else ())):
        for name, accepted in _REFUSED.items():
            if name in values:
                raise UsageError(f"{name}={values[name]!r}: {accepted}")
    if not given.get("output_dir", True):
        raise UsageError("output_dir='': expected a folder")
    for name in ("max_train_samples", "max_eval_samples", "max_seq_length", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UsageError(f"{name}={value!r}: expected a whole number above 0")
    if arguments.sharpness_samples < 0:
        raise UsageError(
            f"sharpness_samples={arguments.sharpness_samples!r}: expected a whole number above 0, or 0 for none"
        )
    studied = _studied(common | given)
    baseline = None if arguments.baseline == "none" else parse_method(arguments.baseline, "baseline")
    methods = [*([] if baseline is None else [baseline]), studied, *parse_methods(arguments.methods)]
    request = Request(
        arguments,
        parse_tasks(arguments.tasks),
        parse_seeds(arguments.seeds),
        tuple(dict.fromkeys(methods)),
        studied,
        baseline,
        given,
        recipe,
    )
    if not arguments.table:
        check(request)
    return request


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the description as it is written."""


def _given(parser: HfArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """Return only what the command line has, without defaults, so that a recipe can stand behind it."""
    parser.parse_args(list(argv))  # --help shows the defaults, which are hidden below
    defaults = {action: action.default for action in parser._actions}
    for action in parser._actions:
        if action.dest != "help":
            action.default = argparse.SUPPRESS
    try:
        return vars(parser.parse_args(list(argv)))
    finally:
        for action, default in defaults.items():
            action.default = default


def parse_tasks(names: Sequence[str]) -> tuple[GlueTask, ...]:
    """Return the tasks of a command line in GLUE's order, ``all`` spelled out.

    Raises:
        UsageError: For an unknown name, or one given twice.
    """
    if list(names) == ["all"]:
        return tuple(TASKS.values())
    found = [get_task(name).name for name in names]
    for name, known in zip(names, found, strict=True):
        if known not in TASKS:
            raise UsageError(f"tasks={name!r}: it has no training rows; expected all, or some of {', '.join(TASKS)}")
    if len(set(found)) < len(found):
        raise UsageError(f"tasks={list(names)!r}: expected each once")
    return tuple(task for name, task in TASKS.items() if name in found)


def parse_seeds(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds that are meant: of one number so many, from 0; of several numbers these.

    Raises:
        UsageError: For numbers that are out of range, or one given twice.
    """
    if len(numbers) == 1 and not 1 <= numbers[0] <= 10_000:
        raise UsageError(f"seeds={numbers[0]!r}: expected how many, from 1 to 10000, or several seeds")
    return check_seeds(range(numbers[0]) if len(numbers) == 1 else numbers)


def check_seeds(numbers: Iterable[int]) -> tuple[int, ...]:
    """Return seeds if all are in range and none is there twice.

    Raises:
        UsageError: If not.
    """
    seeds = tuple(numbers)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise UsageError(f"seeds={seed!r}: expected whole numbers from 0 to 4294967295")
    if len(set(seeds)) < len(seeds):
        raise UsageError(f"seeds={list(seeds)!r}: expected each once")
    return seeds


def _studied(values: dict[str, Any]) -> Method:
    """Return the method of ``optim``, ``optim_args`` and the typed fields."""
    fields = [f"{name}={values[name]}" for name in _OPTIONS if values.get(name) is not None]
    pairs = [*([values["optim_args"]] if values.get("optim_args") else []), *fields]
    name = values.get("optim", "lightsam_adam")
    return parse_method(f"{name}:{sorted_options(','.join(pairs))}", "optim")


def _common(recipe: Recipe) -> dict[str, Any]:
    """Return what a recipe says for all tasks, and refuse what only one suite can have in a task's own settings."""
    for task, own in recipe.tasks.items():
        for name, value in own.items():
            is_common = name in ("optim", "optim_args", *_OPTIONS, *_SUITE_FIELDS) and name != "max_seq_length"
            if is_common and value != recipe.defaults.get(name):
                raise UsageError(
                    f"recipe={str(recipe.path)!r}: {task} has {name}={value!r} of its own; expected it under defaults, "
                    "for all tasks"
                )
    return recipe.defaults


def _has_native_ascent(method: Method) -> bool:
    """Whether a method takes ``ascent_kernels="native"``."""
    if method.name not in RECIPES:
        return False
    recipe = RECIPES[method.name]
    return recipe.example(recipe.arguments(None, recipe.parse(method.options))).why_no_native_ascent() is None


def _of_task(recipe: Recipe | None, task: GlueTask) -> dict[str, Any]:
    return {} if recipe is None else recipe.settings(task.name)


def check(request: Request) -> None:
    """Check all that can be without loading data or model.

    Raises:
        UsageError: Naming the argument.
    """
    if request.recipe is not None:
        for task in request.tasks:
            request.recipe.settings(task.name)
    check_output_dir(request.output_dir)
    if request.arguments.submission:
        missing = [name for name in TASKS if name not in {task.name for task in request.tasks}]
        if missing:
            raise UsageError(f"submission: the GLUE server takes all nine tasks; missing: {', '.join(missing)}")
        if request.studied is None:
            raise UsageError("submission: expected one method whose answers they are, by hf-lightsam glue --optim")
    if request.given.get("ascent_kernels") == "native" and not any(map(_has_native_ascent, request.methods)):
        labels = ", ".join(method.label for method in request.methods)
        raise UsageError(f"ascent_kernels='native': none of the methods has them ({labels}); expected 'torch'")
    for task in request.tasks:
        if request.max_seq_length(task) < 1:
            raise UsageError(f"max_seq_length={request.max_seq_length(task)!r}: expected a whole number above 0")
        for method in request.methods:
            try:
                args = request.training_arguments(task, method, 0, request.output_dir)
            except UsageError as error:
                if method == request.studied:
                    raise
                raise UsageError(f"{_argument(request, method)}={method.label!r}: {error}") from None
            check_training_arguments(args, task)
    if request.arguments.model_name_or_path == PACKAGE and not Path(PACKAGE).is_dir():
        packaged_encoder()


def _argument(request: Request, method: Method) -> str:
    return "baseline" if method == request.baseline else "methods"


def check_training_arguments(args: TrainingArguments, task: GlueTask) -> None:
    """Check what the Trainer itself would notice late, or not at all.

    Raises:
        UsageError: Naming the argument.
    """
    check_number("learning_rate", args.learning_rate)
    check_number("weight_decay", args.weight_decay)
    if not 0 < args.num_train_epochs < math.inf:
        raise UsageError(f"num_train_epochs={args.num_train_epochs!r}: expected a number above 0")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UsageError(f"max_steps={args.max_steps!r}: expected a whole number above 0, or -1 to count epochs")
    if not 0 <= args.warmup_steps < math.inf:
        raise UsageError(f"warmup_steps={args.warmup_steps!r}: expected a number that is at least 0")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name}={getattr(args, name)!r}: expected a whole number above 0")
    best, known = args.metric_for_best_model, ("loss", *task.metrics)
    if args.save_strategy == "best" and best is None:
        raise UsageError(f"save_strategy='best': expected metric_for_best_model, too, one of {', '.join(known)}")
    if best is not None and best.removeprefix("eval_") not in known:
        raise UsageError(f"metric_for_best_model={best!r}: expected, for {task.name}, one of {', '.join(known)}")


def model_source(name: str) -> str:
    """Return what to load a model from: the packaged encoder's folder for its name, else the name itself."""
    return str(packaged_encoder()) if name == PACKAGE and not Path(name).is_dir() else name
