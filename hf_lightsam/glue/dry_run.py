"""What ``--dry_run`` does: a script's whole course in seconds, with a tiny model, on CPUs, without hub and network.

The script runs as it is, from its flags to its predictions; what is changed are the flags. They name a model of the
same architecture shrunk to width 16, a tokenizer by words, and a folder of invented rows in GLUE's layout, all made for
the occasion in a temporary folder that is gone afterwards. What is not tried: the model's own weights and tokenizer,
the memory that it needs, and the GPU.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers.trainer
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from ..demo.dataset import make_rows
from ..errors import report_usage_errors
from ..interruptible import without_resume
from ..optim.recipes import get_recipe
from ..optim_flag import is_registered, optim_name
from .arguments import DataArguments
from .instructions import instruction_for, observed_range
from .own_data import load_own_data
from .recipe import last_flags
from .tasks import GlueTask, get_task

STEPS = 2
BATCH = 4
"""Rows of a micro-batch on each device, at most: the window keeps its shape, not its size."""

MAX_ROWS = 512
SMALL = {
    "hidden_size": 16,
    "embedding_size": 16,
    "pooler_hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
"""Sizes that a configuration is shrunk to, where it has them under these names."""

ALIASES = {
    "minilm": "bert",
    "deberta-v3": "deberta-v2",
    "mdeberta": "deberta-v2",
    "qwen2.5": "qwen2",
    "pythia": "gpt_neox",
}
"""Architectures of models that are not named after them."""


@dataclass
class DryRunArguments:
    """The flag, for ``HfArgumentParser``."""

    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Try the command out in seconds: two steps, evaluation and prediction of a tiny model on invented "
            "rows, on CPUs, without hub and GPU. Writes nothing."
        },
    )


def wants_dry_run(argv: Sequence[str]) -> bool:
    """Return whether a command line has ``--dry_run``, with or without a value that says yes."""
    value = last_flags(argv, "dry_run")["dry_run"]
    return value is not None and value.lower() in ("true", "t", "yes", "y", "1")


def dry_run(
    main: Callable[[Sequence[str]], dict[str, float]],
    argv: Sequence[str],
    parser: HfArgumentParser,
    *,
    is_causal: bool = False,
) -> dict[str, float]:
    """Run a script with its flags changed for a dry run, and print what was checked.

    Args:
        main: The script's main function, which takes a command line.
        argv: The command line, a recipe applied already.
        parser: The script's parser.
        is_causal: Whether the script trains a causal language model, not a classifier.

    Returns:
        What ``main`` returns.

    Raises:
        SystemExit: As ``main``; with status 2 for a model of an architecture that has no such head.
        RuntimeError: If a loss was not finite, or the two steps were not taken.
    """
    watch = _Watch()
    with tempfile.TemporaryDirectory(prefix="hf_lightsam_dry_run_") as folder, _fit_for_cpus(watch):
        with report_usage_errors(parser.prog):
            changed = _change_flags(list(argv), parser, Path(folder), is_causal, watch)
        metrics = main(changed)
    watch.check()
    if PartialState().is_main_process:
        print(watch.report(metrics), flush=True)
    return metrics


# ---- The flags ------------------------------------------------------------------------------------------------------


def _change_flags(argv: list[str], parser: HfArgumentParser, folder: Path, is_causal: bool, watch: _Watch) -> list[str]:
    """Return the command line with what a dry run replaces at its end, where it wins."""
    known = {action.dest for action in parser._actions}
    given = last_flags(
        argv,
        *("model_name_or_path", "cache_dir", "fp16", "torch_compile"),
        *("per_device_train_batch_size", "gradient_accumulation_steps"),
    )
    data = HfArgumentParser(DataArguments).parse_args_into_dataclasses(argv, return_remaining_strings=True)[0]  # type: ignore[arg-type]
    size, pieces = _number(given["per_device_train_batch_size"], 8), _number(given["gradient_accumulation_steps"], 1)
    batch = min(size, BATCH)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    num_rows = min(STEPS * batch * pieces * num_processes, MAX_ROWS)
    watch.wanted_batch = size
    config = _small_config(given["model_name_or_path"] or "", given["cache_dir"], is_causal, watch)
    prepare = _invent_rows if data.task_name is not None else _find_own_rows
    texts, row_flags, watch.rows = prepare(data, num_rows, folder / "glue")
    _save_model(config, _make_tokenizer(config, texts), folder / "model", is_causal)
    flags: dict[str, Any] = {
        "model_name_or_path": folder / "model",
        "tokenizer_name": folder / "model",
        "output_dir": folder / "out",
        "max_steps": STEPS,
        "per_device_train_batch_size": batch,
        "per_device_eval_batch_size": BATCH,
        "logging_steps": 1,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "use_cpu": True,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "dry_run": False,
        **row_flags,
    }
    if given["fp16"] == "true":
        flags |= {"fp16": False, "bf16": True}
        watch.notes.append("float16 is not to be had on CPUs: bfloat16 in its place")
    if given["torch_compile"] == "true":
        flags["torch_compile"] = False
        watch.notes.append("nothing was compiled (--torch_compile)")
    line = [part for name, value in flags.items() if name in known for part in (f"--{name}", str(value))]
    return ["--log_level", "error", *without_resume(argv), *line]


def _number(text: str | None, default: int) -> int:
    return int(text) if text is not None and text.isdecimal() and int(text) > 0 else default


# ---- Model and tokenizer --------------------------------------------------------------------------------------------


def _small_config(name: str, cache_dir: str | None, is_causal: bool, watch: _Watch) -> PreTrainedConfig:
    try:
        config = deepcopy(AutoConfig.from_pretrained(name, cache_dir=cache_dir, local_files_only=True))
        origin = "its configuration"
    except (OSError, ValueError):  # not on this machine, or with code of its own
        model_type = guess_model_type(name, is_causal)
        origin = "its name" if model_type else "nothing: neither its configuration nor its architecture is known here"
        config = AutoConfig.for_model(model_type or ("gpt2" if is_causal else "bert"))
    for attribute, value in SMALL.items():
        if getattr(config, attribute, None) is not None:
            setattr(config, attribute, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    watch.model = (
        f"{config.model_type} of width {SMALL['hidden_size']}, by {origin}, in place of {name or 'none given'}"
    )
    return config


def guess_model_type(name: str, is_causal: bool = False) -> str | None:
    """Return the architecture that a model's name tells: the longest one whose name is part of it, or None.

    Args:
        name: Like ``FacebookAI/roberta-large``.
        is_causal: Whether to look among causal language models, not among those with a head to classify.
    """
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if is_causal else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    known = {model_type: model_type for model_type in names if len(model_type) > 3} | ALIASES
    found = [part for part in known if part in name.lower() and known[part] in names]
    return known[max(found, key=len)] if found else None


def _make_tokenizer(config: PreTrainedConfig, texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Make a tokenizer of whole words and of digits; for decoders one without a token to pad by, as theirs are."""
    is_decoder = (
        config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    special = ["<unk>", "</s>"] if is_decoder else ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    splitter = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    words = dict.fromkeys(word for text in [*texts, "0123456789.-"] for word, _ in splitter.pre_tokenize_str(text))
    vocabulary = {word: index for index, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[0] if is_decoder else "[UNK]"))
    tokenizer.pre_tokenizer = splitter
    if is_decoder:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    has_types = getattr(config, "type_vocab_size", 0) > 1
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", *(["token_type_ids"] if has_types else []), "attention_mask"],
        **{f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    )


def _save_model(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, folder: Path, is_causal: bool) -> None:
    config.vocab_size = len(tokenizer)
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config.bos_token_id = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.eos_token_id
    config.eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on all processes
        model = (AutoModelForCausalLM if is_causal else AutoModelForSequenceClassification).from_config(config)
    if not is_causal:  # as a pretrained encoder comes: the head is the task's, and new
        model = model.base_model
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- Rows -----------------------------------------------------------------------------------------------------------


def _invent_rows(data: DataArguments, number: int, folder: Path) -> tuple[list[str], dict[str, Any], str]:
    """Write rows of a task of GLUE; return all that is said in them, the flags that name them, and what they are."""
    task = get_task(str(data.task_name))
    sentences = [row["sentence"] for row in make_rows("train", math.ceil((number + 1) / 2), seed=0)][: number + 1]
    write_rows(task, folder, sentences)
    flags = {
        "data_dir": folder,
        "verify_data": False,
        "do_train": "train" in task.splits,
        "do_eval": bool(task.validation_splits),
        "do_predict": bool(task.test_splits),
    }
    instruction = instruction_for(task)
    return [*sentences, instruction.template, *instruction.answers], flags, f"invented ones of {task.name}"


def _find_own_rows(data: DataArguments, number: int, folder: Path) -> tuple[list[str], dict[str, Any], str]:
    """Return the same for rows of one's own, which lie on this machine already and are cut to the first few."""
    task, rows = load_own_data(
        str(data.train_file),
        data.validation_file,
        text_columns=data.text_columns or [],
        label_column=str(data.label_column),
        validation_share=data.validation_share,
        regression=data.regression,
        class_names=data.class_names,
        on_missing="drop",  # here; the script does as it is told, and tells
    )
    texts = [text for column in task.text_columns for text in rows["train"][column][:number]]
    flags = {
        "max_train_samples": number,
        "max_eval_samples": BATCH,
        "max_predict_samples": BATCH,
        "do_predict": data.test_file is not None,
    }
    instruction = instruction_for(task, observed_range(task, rows))
    return [*texts, instruction.template, *instruction.answers], flags, "the first of your own"


def write_rows(task: GlueTask, folder: Path, texts: Sequence[str]) -> None:
    """Write invented rows of a task in GLUE's own layout.

    Args:
        task: The task.
        folder: The layout's folder.
        texts: Sentences, one more than training rows; a pair is one and the next. Labels take turns. The other splits
            have 6 rows each.
    """
    for split in task.splits:
        is_test, number = split in task.test_splits, len(texts) - 1 if split == "train" else 6
        has_header = task.name != "cola" or is_test
        columns = ["index", *task.tsv_text_columns, *([] if is_test else [task.tsv_label_column])]
        lines = ["\t".join(columns)] if has_header else []
        for index in range(number):
            row = [texts[(index + offset) % len(texts)] for offset in range(len(task.text_columns))]
            low, high = task.score_range
            turn = index % (task.num_labels if task.labels else 11)
            label = task.tsv_labels[turn] if task.labels else f"{low + (high - low) * turn / 10:.3f}"
            if has_header:
                lines.append("\t".join([str(index), *row, *([] if is_test else [label])]))
            else:
                lines.append("\t".join(["invented", label, "", *row]))
        path = folder / task.folder / task.file_name(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---- Engines without a GPU ------------------------------------------------------------------------------------------


@contextmanager
def fsdp_on_cpus() -> Iterator[None]:
    """In the body, FSDP2 runs on CPUs with gloo.

    As read from accelerate 1.15, whose ``AcceleratorState`` turns FSDP on where there is an accelerator only; what it
    then does works without one as well.
    """
    original = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    with mock.patch.object(AcceleratorState, "__init__", init):
        yield


@contextmanager
def _fit_for_cpus(watch: _Watch) -> Iterator[None]:
    callbacks = [*transformers.trainer.DEFAULT_CALLBACKS, watch]
    precision = {}
    if os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16":
        precision["ACCELERATE_MIXED_PRECISION"] = "bf16"
        watch.notes.append("float16 is not to be had on CPUs: bfloat16 in its place")
    with (
        fsdp_on_cpus(),
        mock.patch.object(transformers.trainer, "DEFAULT_CALLBACKS", callbacks),
        mock.patch.dict(os.environ, precision),
    ):
        yield


# ---- What has been seen ---------------------------------------------------------------------------------------------


class _Watch(TrainerCallback):
    """Sees what the Trainer does, for the report."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.model = self.rows = ""
        self.wanted_batch = 0
        self.lines: dict[str, str] = {}
        self.losses: list[float] = []
        self.steps = self.num_evaluations = self.num_predictions = 0
        self.trains = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trains = True
        engine = AcceleratorState()
        is_sharded = any(isinstance(weight, DTensor) for weight in kwargs["model"].parameters())
        num_trained = sum(weight.numel() for weight in kwargs["model"].parameters() if weight.requires_grad)
        kind = "FSDP2, weights sharded" if is_sharded else "DDP" if args.world_size > 1 else "no engine"
        batch, pieces = args.per_device_train_batch_size, args.gradient_accumulation_steps
        name = optim_name(args.optim)
        method = f" ({get_recipe(name).summary})" if is_registered(args.optim) else ""
        self.lines = {
            "model": f"{self.model}; {num_trained:,} weights are trained",
            "method": f"{name}{method}, {type(kwargs['optimizer'].optimizer).__name__}",
            "precision": "float32" if engine.mixed_precision == "no" else f"{engine.mixed_precision} autocast",
            "processes": f"{args.world_size} on {args.device.type}, {kind}",
            "window": f"{batch} rows x {pieces} micro-batches x {args.world_size} processes a step"
            + (f"; yours has {self.wanted_batch} for {batch}" if self.wanted_batch > batch else ""),
            "rows": f"{len(kwargs['train_dataloader'].dataset)} to train on, {self.rows}",
        }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.losses += [logs["loss"]] if "loss" in (logs or {}) else []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps = state.global_step

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.num_evaluations += 1

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> None:
        self.num_predictions += 1

    def check(self) -> None:
        """Raise if the steps were not taken as they should have been."""
        if self.trains and (self.steps != STEPS or not all(map(math.isfinite, self.losses))):
            raise RuntimeError(f"dry run: {self.steps} of {STEPS} steps taken, with the losses {self.losses}")

    def report(self, metrics: dict[str, float]) -> str:
        """Return what was checked, a line for each thing."""
        names = [name for name in metrics if not name.endswith(("runtime", "per_second", "samples", "epoch"))]
        evaluated = f"evaluation of {self.num_evaluations} sets ({', '.join(names)}), " if names else ""
        lines = {
            **({"model": self.model, "rows": self.rows} | self.lines),
            "checked": f"{self.steps} steps, {evaluated}prediction of {self.num_predictions} sets",
            "not": "the model's own weights and tokenizer, the memory they take, anything of a GPU",
            **{f"note {number}": note for number, note in enumerate(dict.fromkeys(self.notes), 1)},
        }
        head = "Dry run passed. Nothing of it is left; its numbers mean nothing."
        return "\n".join([head, *(f"  {name:<10} {text}" for name, text in lines.items())])
