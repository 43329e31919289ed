"""What scripts for text tasks have in common around the Trainer: their logging, and train, evaluate and predict."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from transformers import TrainingArguments, set_seed

from ..interruptible import resolve_checkpoint, train_interruptibly
from ..trainer import LightSAMTrainer
from ..training_args import LightSAMTrainingArguments
from .arguments import DataArguments
from .data import HUB_DATASET
from .finetuning import evaluate, pick_best_by_metric, predict
from .recipe import last_flags
from .rows import load_requested_rows
from .tasks import GlueTask, TextTask

logger = logging.getLogger(__name__)


def set_up_logging(args: TrainingArguments) -> None:
    """Log to standard error, at the level that the arguments give this process."""
    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    level = args.get_process_log_level()
    logging.getLogger("hf_lightsam").setLevel(level)
    datasets.utils.logging.set_verbosity(level)
    transformers.utils.logging.set_verbosity(level)
    transformers.utils.logging.enable_explicit_format()


def begin(
    data_arguments: DataArguments, args: LightSAMTrainingArguments, line: Sequence[str]
) -> tuple[TextTask, datasets.DatasetDict, str | None]:
    """Do what comes between a script's flags and its model: logging, seed, checkpoint, rows.

    Args:
        data_arguments: Which rows.
        args: The Trainer's arguments; ``metric_for_best_model`` and pinned memory are set to what fits.
        line: The flags that ``args`` were parsed from.

    Returns:
        The task, its rows, not tokenized, and the checkpoint to resume from, None to start.

    Raises:
        UsageError: If there is nothing to do, nothing to resume from, or the rows are not as they should be.
    """
    set_up_logging(args)
    args.dataloader_pin_memory &= torch.accelerator.is_available()  # nothing to pin for, and a warning a run
    checkpoint = resolve_checkpoint(str(args.output_dir), args.resume_from_checkpoint) if args.do_train else None
    set_seed(args.seed)
    task, rows = load_requested_rows(data_arguments, args)
    pick_best_by_metric(args, task, last_flags(line, "metric_for_best_model")["metric_for_best_model"])
    return task, rows, checkpoint


def run_phases(
    trainer: LightSAMTrainer,
    task: TextTask,
    rows: datasets.DatasetDict,
    checkpoint: str | None,
    command: Sequence[str],
    base_model: str,
) -> dict[str, float]:
    """Do what ``do_train``, ``do_eval`` and ``do_predict`` ask for, with the files that Transformers' scripts write.

    What was trained gets a model card, and with ``push_to_hub`` goes to the hub.

    Args:
        trainer: From :func:`~hf_lightsam.glue.finetuning.build_trainer`.
        task: The task.
        rows: Tokenized, by split.
        checkpoint: What to resume from, None to start.
        command: The script and its arguments, for the message that says how to go on after Ctrl-C.
        base_model: What was fine-tuned, a folder or a name on the hub.

    Returns:
        The metrics of the development splits.
    """
    metrics: dict[str, float] = {}
    if trainer.args.do_train:
        _train(trainer, checkpoint, command)
    if trainer.args.do_eval:
        metrics = _evaluate(trainer, task, rows)
    if trainer.args.do_predict:
        _predict(trainer, task, rows)
    if trainer.args.do_train:
        _share(trainer, task, base_model)
    return metrics


def _train(trainer: LightSAMTrainer, checkpoint: str | None, command: Sequence[str]) -> None:
    result = train_interruptibly(trainer, checkpoint, ["python", *command])
    metrics = {**result.metrics, "train_samples": len(trainer.train_dataset)}  # type: ignore[arg-type]
    trainer.save_model()
    trainer.log_metrics("train", metrics)
    trainer.save_metrics("train", metrics)
    trainer.save_state()


def _evaluate(trainer: LightSAMTrainer, task: TextTask, rows: datasets.DatasetDict) -> dict[str, float]:
    everything: dict[str, float] = {}
    for prefix, metrics in evaluate(trainer, task, rows).items():
        trainer.log_metrics(prefix, metrics)
        trainer.save_metrics(prefix, metrics)
        everything |= metrics
    return everything


def _predict(trainer: LightSAMTrainer, task: TextTask, rows: datasets.DatasetDict) -> None:
    for split in task.test_splits:
        predictions = predict(trainer, task, rows[split])
        if trainer.is_world_process_zero():
            suffix = "-mm" if split.endswith("mismatched") else ""
            path = Path(str(trainer.args.output_dir)) / f"predict_results_{task.name}{suffix}.txt"
            with path.open("w", encoding="utf-8") as file:
                file.write("index\tprediction\n")
                for index, answer in zip(rows[split]["idx"][:], predictions, strict=True):
                    file.write(f"{index}\t{f'{answer:.3f}' if task.is_regression else task.labels[answer]}\n")
            logger.info("wrote %s", path)


def _share(trainer: LightSAMTrainer, task: TextTask, base_model: str) -> None:
    told: dict[str, str] = {"tasks": "text-classification"}
    if not Path(base_model).is_dir():  # a folder's name says nothing to others
        told["finetuned_from"] = base_model
    if isinstance(task, GlueTask):
        told |= {"language": "en", "dataset_tags": HUB_DATASET, "dataset": f"GLUE {task.folder}"}
        told["dataset_args"] = task.name
    else:
        told["dataset"] = task.name
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**told)
    else:
        trainer.create_model_card(**told)
