"""Which rows the runs of a suite train on and are evaluated on, and a digest by which they are known again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import datasets

from ..data import load_glue
from ..tasks import GlueTask

EVALUATION_SEED = 0
"""Of the choice of evaluation rows, which is the same for all runs."""


def digest(value: Any) -> str:
    """Return 12 hexadecimal digits that stand for a value of JSON's types."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def choose(rows: datasets.Dataset, limit: int | None, seed: int) -> datasets.Dataset:
    """Return the rows in an order drawn by ``seed``, the first ``limit`` of them if it is not None."""
    shuffled = rows.shuffle(seed=seed)
    return shuffled if limit is None else shuffled.select(range(min(limit, len(rows))))


@dataclass
class TaskRows:
    """A task's rows, not tokenized.

    Attributes:
        task: The task.
        evaluation: Development rows by split, the same for all runs.
        train: Training rows by seed.
        digests: Of training and development rows in their order, by seed.
    """

    task: GlueTask
    evaluation: dict[str, datasets.Dataset]
    train: dict[int, datasets.Dataset]
    digests: dict[int, str]


def choose_rows(
    task: GlueTask,
    raw: datasets.DatasetDict,
    seeds: Iterable[int],
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
) -> TaskRows:
    """Choose the rows of a task.

    Args:
        task: The task.
        raw: Its splits ``train`` and those to evaluate on, from :func:`~hf_lightsam.glue.load_glue`.
        seeds: Of the runs; each has a choice and an order of training rows of its own.
        max_train_samples: Training rows at most, chosen at random for each seed. None: all.
        max_eval_samples: Rows at most of each development split, chosen at random. None: all, in an order drawn once.
    """
    splits = [split for split in task.validation_splits if split in raw]
    evaluation = {split: choose(raw[split], max_eval_samples, EVALUATION_SEED) for split in splits}
    train = {seed: choose(raw["train"], max_train_samples, seed) for seed in seeds}
    columns = (*task.text_columns, "label")
    digests = {
        seed: digest([part[name][:] for part in (rows, *evaluation.values()) for name in columns])
        for seed, rows in train.items()
    }
    return TaskRows(task, evaluation, train, digests)


def load_rows(
    task: GlueTask,
    data_dir: str | None,
    seeds: Iterable[int],
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    splits: Iterable[str] | None = None,
    verify: bool = True,
) -> TaskRows:
    """Load a task's rows and choose those of :func:`choose_rows`.

    Args:
        task: The task.
        data_dir: As for :func:`~hf_lightsam.glue.load_glue`.
        seeds: Of the runs.
        max_train_samples: Training rows at most. None: all.
        max_eval_samples: Rows at most of each development split. None: all.
        splits: Development splits. Default: all of the task.
        verify: As for :func:`~hf_lightsam.glue.load_glue`.

    Raises:
        UsageError: As by :func:`~hf_lightsam.glue.load_glue`.
    """
    wanted = ["train", *(task.validation_splits if splits is None else splits)]
    raw = load_glue(task, data_dir, splits=wanted, verify=verify)
    return choose_rows(task, raw, seeds, max_train_samples, max_eval_samples)
