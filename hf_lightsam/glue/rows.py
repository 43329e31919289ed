"""The rows that a script's flags ask for, with what is remarkable about them told before any training."""

from __future__ import annotations

import datasets
from transformers import TrainingArguments
from transformers.utils import logging

from ..errors import UsageError
from .arguments import DataArguments
from .data import load_glue
from .data_report import report_rows
from .own_data import load_own_data
from .tasks import GlueTask, TextTask, get_task

logger = logging.get_logger(__name__)


def load_requested_rows(arguments: DataArguments, args: TrainingArguments) -> tuple[TextTask, datasets.DatasetDict]:
    """Load the splits that ``do_train``, ``do_eval`` and ``do_predict`` need, and log what one should know of them.

    Args:
        arguments: Which task or files, and how many rows.
        args: The Trainer's arguments.

    Returns:
        The task and its rows, not tokenized.

    Raises:
        UsageError: If rows that are needed are not there, or not as they should be.
    """
    if not (args.do_train or args.do_eval or args.do_predict):
        raise UsageError("nothing to do: expected --do_train, --do_eval or --do_predict")
    task, rows = _load_glue(arguments, args) if arguments.task_name is not None else _load_own(arguments, args)
    for split, limit in _limits(task, arguments, args).items():
        if split in rows and limit is not None:
            rows[split] = rows[split].select(range(min(limit, len(rows[split]))))
    if args.process_index == 0:
        report = report_rows(rows, task)
        logger.info(str(report))
        for line in report.warnings:
            logger.warning(line)
    return task, rows


def _limits(task: TextTask, arguments: DataArguments, args: TrainingArguments) -> dict[str, int | None]:
    """Return the splits that are needed, each with the number of rows at most."""
    limits: dict[str, int | None] = {"train": arguments.max_train_samples} if args.do_train else {}
    if args.do_eval:
        limits |= dict.fromkeys(task.validation_splits, arguments.max_eval_samples)
    if args.do_predict:
        limits |= dict.fromkeys(task.test_splits, arguments.max_predict_samples)
    return limits


def _load_glue(arguments: DataArguments, args: TrainingArguments) -> tuple[GlueTask, datasets.DatasetDict]:
    assert arguments.task_name is not None
    task = get_task(arguments.task_name)
    if task.training_task and (args.do_train or args.do_eval):
        raise UsageError(
            f"task_name={task.name!r}: has only rows to predict; expected --do_predict alone, with a model that was "
            f"fine-tuned on {task.training_task}"
        )
    needed = list(_limits(task, arguments, args))
    return task, load_glue(task, arguments.data_dir, splits=needed, verify=arguments.verify_data)


def _load_own(arguments: DataArguments, args: TrainingArguments) -> tuple[TextTask, datasets.DatasetDict]:
    assert arguments.train_file is not None
    assert arguments.text_columns is not None
    assert arguments.label_column is not None
    if args.do_predict and arguments.test_file is None:
        raise UsageError("do_predict=True: there is nothing to predict; expected --test_file with your rows")
    task, rows = load_own_data(
        arguments.train_file,
        arguments.validation_file,
        arguments.test_file,
        text_columns=arguments.text_columns,
        label_column=arguments.label_column,
        validation_share=arguments.validation_share,
        regression=arguments.regression,
        class_names=arguments.class_names,
        metrics=arguments.metrics,
        on_missing=arguments.on_missing,
        seed=args.seed,
    )
    needed = _limits(task, arguments, args)
    return task, datasets.DatasetDict({split: part for split, part in rows.items() if split in needed})
