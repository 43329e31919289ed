"""Fine-tune a model on a GLUE task with LightSAM, its family, or any optimizer of Transformers.

From the hub:

    python examples/run_glue.py --model_name_or_path google-bert/bert-base-cased --task_name mrpc \
        --do_train --do_eval --output_dir outputs/mrpc

Without a hub, model and data in local folders (data in GLUE's own TSV layout), on several processes:

    accelerate launch examples/run_glue.py --model_name_or_path models/bert --task_name cola --data_dir glue \
        --do_train --do_eval --optim lightsam_adam --rho 0.05 --output_dir outputs/cola

Every flag of ``TrainingArguments`` works; ``--help`` lists them. Ctrl-C saves a checkpoint after the present step and
says how to go on.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from hf_lightsam import LightSAMTrainer, LightSAMTrainingArguments, UsageError
from hf_lightsam.errors import report_usage_errors
from hf_lightsam.glue import TASKS, GlueTask, get_task, load_glue, make_compute_metrics, preprocess
from hf_lightsam.interruptible import resolve_checkpoint, train_interruptibly

PROGRAM = "run_glue.py"
logger = logging.getLogger(__name__)


@dataclass
class DataArguments:
    """Which task, from where, and how much of it."""

    task_name: str = field(metadata={"help": f"The GLUE task: {', '.join(TASKS)}."})
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder in GLUE's own TSV layout (CoLA/train.tsv, ...). Default: nyu-mll/glue from the hub."},
    )
    max_seq_length: int = field(default=128, metadata={"help": "Longer inputs are cut to so many tokens."})
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad all inputs to max_seq_length, not each batch to its longest."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many training rows."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use so many rows of each evaluation split."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use so many rows of each test split."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})

    def __post_init__(self) -> None:
        """Check what can be checked before anything is loaded."""
        self.task = get_task(self.task_name)
        for name in ("max_seq_length", "max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name}={value!r}: expected a whole number above 0")


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the hub."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Another tokenizer than the model's."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where what comes from the hub is kept."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    token: str | None = field(default=None, metadata={"help": "Token for the hub, for private models."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})
    ignore_mismatched_sizes: bool = field(
        default=False, metadata={"help": "Replace a classification head of another size by a new one."}
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Run what the flags ask for.

    Args:
        argv: The command line after the program's name. Default: that of the process.

    Returns:
        All metrics.
    """
    command = list(sys.argv) if argv is None else [PROGRAM, *argv]
    with report_usage_errors(PROGRAM):
        parser = HfArgumentParser(
            (ModelArguments, DataArguments, LightSAMTrainingArguments),  # type: ignore[arg-type]
            prog=PROGRAM,
            description=__doc__,
        )
        model_arguments, data_arguments, args = _parse(parser, command[1:])
        _set_up_logging(args)
        args.dataloader_pin_memory &= torch.accelerator.is_available()  # nothing to pin for, and a warning a run
        if not (args.do_train or args.do_eval or args.do_predict):
            raise UsageError("nothing to do: expected --do_train, --do_eval or --do_predict")
        checkpoint = resolve_checkpoint(str(args.output_dir), args.resume_from_checkpoint) if args.do_train else None
        set_seed(args.seed)
        task = data_arguments.task
        needed = ["train"] if args.do_train else []
        needed += list(task.validation_splits) if args.do_eval else []
        needed += list(task.test_splits) if args.do_predict else []
        raw = load_glue(task, data_arguments.data_dir, splits=needed)
        model, tokenizer = _load_model(model_arguments, task)
        rows = _prepare(raw, task, tokenizer, data_arguments, args)
        trainer = LightSAMTrainer(
            model,
            args,
            train_dataset=rows.get("train"),
            eval_dataset=rows[task.validation_splits[0]] if args.do_eval else None,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(
                tokenizer,
                padding="max_length" if data_arguments.pad_to_max_length else True,
                max_length=data_arguments.max_seq_length if data_arguments.pad_to_max_length else None,
                pad_to_multiple_of=8 if args.fp16 and not data_arguments.pad_to_max_length else None,
            ),
            compute_metrics=make_compute_metrics(task),
        )
    if args.do_train:
        _train(trainer, checkpoint, command)
    metrics: dict[str, float] = {}
    if args.do_eval:
        metrics = _evaluate(trainer, task, rows)
    if args.do_predict:
        _predict(trainer, task, rows)
    return metrics


def _parse(
    parser: HfArgumentParser, argv: list[str]
) -> tuple[ModelArguments, DataArguments, LightSAMTrainingArguments]:
    if len(argv) == 1 and argv[0].endswith((".json", ".yaml", ".yml")):
        if not Path(argv[0]).is_file():
            raise UsageError(f"{argv[0]}: no such file; expected flags, or one JSON or YAML file that holds them")
        parse_file = parser.parse_json_file if argv[0].endswith(".json") else parser.parse_yaml_file
        return parse_file(argv[0])  # type: ignore[return-value]
    return parser.parse_args_into_dataclasses(argv)  # type: ignore[return-value]


def _set_up_logging(args: LightSAMTrainingArguments) -> None:
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    level = args.get_process_log_level()
    logger.setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_explicit_format()


def _load_model(arguments: ModelArguments, task: GlueTask) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    options: dict[str, Any] = {
        "cache_dir": arguments.cache_dir,
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }
    try:
        config = AutoConfig.from_pretrained(
            arguments.model_name_or_path, num_labels=task.num_labels, finetuning_task=task.name, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer_name or arguments.model_name_or_path, **options)
        model = AutoModelForSequenceClassification.from_pretrained(
            arguments.model_name_or_path,
            config=config,
            ignore_mismatched_sizes=arguments.ignore_mismatched_sizes,
            **options,
        )
    except OSError as error:
        raise UsageError(f"model_name_or_path={arguments.model_name_or_path!r}: {error}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise UsageError(
            f"model_name_or_path={arguments.model_name_or_path!r}: its classification head is not one for {task.name} "
            f"({task.num_labels} outputs); expected another model, or --ignore_mismatched_sizes for a new head"
        ) from error
    if not task.is_regression:
        model.config.id2label = dict(enumerate(task.labels))
        model.config.label2id = {label: index for index, label in enumerate(task.labels)}
    if tokenizer.pad_token is None:  # decoders have none; batches need one
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


def _prepare(
    raw: datasets.DatasetDict,
    task: GlueTask,
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    args: LightSAMTrainingArguments,
) -> datasets.DatasetDict:
    limits = {"train": arguments.max_train_samples}
    limits |= dict.fromkeys(task.validation_splits, arguments.max_eval_samples)
    limits |= dict.fromkeys(task.test_splits, arguments.max_predict_samples)
    for split in list(raw):
        limit = limits.get(str(split))
        if limit is not None:
            raw[split] = raw[split].select(range(min(limit, len(raw[split]))))
    with args.main_process_first(desc="tokenizing"):
        return preprocess(raw, task, tokenizer, arguments.max_seq_length, num_proc=arguments.preprocessing_num_workers)


def _train(trainer: LightSAMTrainer, checkpoint: str | None, command: Sequence[str]) -> None:
    result = train_interruptibly(trainer, checkpoint, ["python", *command])
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}  # type: ignore[arg-type]
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def _evaluate(trainer: LightSAMTrainer, task: GlueTask, rows: datasets.DatasetDict) -> dict[str, float]:
    everything: dict[str, float] = {}
    for split in task.validation_splits:
        # "eval" for the split that all tasks have in common, "eval_mm" for MNLI's second one, as in the original script
        prefix = "eval_mm" if split.endswith("mismatched") else "eval"
        metrics = trainer.evaluate(rows[split], metric_key_prefix=prefix)
        metrics[f"{prefix}_samples"] = len(rows[split])
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        everything |= metrics
    return everything


def _predict(trainer: LightSAMTrainer, task: GlueTask, rows: datasets.DatasetDict) -> None:
    for split in task.test_splits:
        # The labels of test sets are not public; the columns hold -1.
        predictions = trainer.predict(rows[split].remove_columns("label"), metric_key_prefix="predict").predictions
        if isinstance(predictions, tuple):
            predictions = predictions[0]
        if trainer.is_world_process_zero():
            suffix = "-mm" if split.endswith("mismatched") else ""
            path = Path(str(trainer.args.output_dir)) / f"predict_results_{task.name}{suffix}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, row in enumerate(predictions):
                    answer = f"{float(row.squeeze()):.3f}" if task.is_regression else task.labels[int(row.argmax())]
                    file.write(f"{index}\t{answer}\n")
            logger.info("wrote %s", path)


if __name__ == "__main__":
    main()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may abort a rank that exits
