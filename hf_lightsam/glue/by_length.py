"""Rows of like length side by side, so that batches padded to their longest row hold little padding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput


def lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return how many tokens each row has: integers of shape ``(rows,)``, read from Arrow without a loop in Python."""
    if not len(rows):  # whose columns may have no type
        return np.zeros(0, dtype=np.int64)
    tokens = rows.select_columns("input_ids").with_format("arrow")[:]["input_ids"]
    return np.asarray(pc.list_value_length(tokens), dtype=np.int64)


def longest_first(rows: datasets.Dataset) -> tuple[datasets.Dataset, np.ndarray]:
    """Sort tokenized rows by their number of tokens, the longest first: what does not fit in memory fails at once.

    Args:
        rows: From :func:`~hf_lightsam.glue.preprocess`; rows of one length keep their order.

    Returns:
        The sorted rows, and the places that they had: integers of shape ``(rows,)``.
    """
    order = np.argsort(-lengths(rows), kind="stable")
    return rows.select(order), order


def for_evaluation(rows: Any) -> Any:
    """Return rows, or None, as a Trainer is to evaluate them: tokenized ones the longest first, others as they are."""
    is_tokenized = isinstance(rows, datasets.Dataset) and "input_ids" in rows.column_names
    return longest_first(rows)[0] if is_tokenized else rows


def padding_share(rows: datasets.Dataset, batch_size: int) -> float:
    """Return the share of padding among the tokens of ``rows`` in their order, each batch padded to its longest row."""
    tokens = lengths(rows)
    parts = np.split(tokens, range(batch_size, len(tokens), batch_size))
    padded = sum(int(part.max()) * len(part) for part in parts if len(part))
    return 1.0 - int(tokens.sum()) / padded if padded else 0.0


def predict_in_order(trainer: Trainer, rows: datasets.Dataset, prefix: str) -> PredictionOutput:
    """Predict rows in batches of like length; what comes back is in the order of ``rows``.

    ``Trainer.predict`` itself answers in the order of its sampler, which with ``train_sampling_strategy=
    "group_by_length"`` is not that of the rows (transformers 5.24).

    Args:
        trainer: Whose model predicts.
        rows: Tokenized.
        prefix: ``metric_key_prefix`` of the Trainer's method.

    Returns:
        As of ``Trainer.predict``; several predictions a row are in a tuple, or in a dict by name.
    """
    by_length, order = longest_first(rows)
    with in_given_order(trainer):
        output = trainer.predict(by_length, metric_key_prefix=prefix)
    back = np.argsort(order)

    def put_back(values: Any) -> Any:
        if isinstance(values, Mapping):
            return {name: put_back(value) for name, value in values.items()}
        if isinstance(values, (tuple, list)):
            return tuple(map(put_back, values))
        return values if values is None else values[back]

    return PredictionOutput(put_back(output.predictions), put_back(output.label_ids), output.metrics)


@contextmanager
def in_given_order(trainer: Trainer) -> Iterator[None]:
    """In the body, the Trainer's evaluation and prediction take rows as they come."""
    strategy = trainer.args.train_sampling_strategy
    trainer.args.train_sampling_strategy = "sequential"
    try:
        yield
    finally:
        trainer.args.train_sampling_strategy = strategy
