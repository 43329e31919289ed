"""Reads the TSV files of GLUE's own download."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from transformers.utils import logging

from ..errors import UsageError
from .official import warn_if_different
from .tasks import UNLABELED, GlueTask

logger = logging.get_logger(__name__)

_COLA_COLUMNS = ("source", "label", "note", "sentence")  # its train and dev files have no header


def features(task: GlueTask) -> datasets.Features:
    """Return the columns of a task's rows and their types, as on the hub."""
    label = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
    texts = {column: datasets.Value("string") for column in task.text_columns}
    return datasets.Features({**texts, "label": label, "idx": datasets.Value("int32")})


def read_split(task: GlueTask, split: str, path: Path, verify: bool = True) -> datasets.Dataset:
    """Read one file.

    Args:
        task: The task.
        split: The split that the file holds.
        path: The file.
        verify: Whether to warn if it is not the official one.

    Returns:
        The rows with the columns that :func:`features` gives; ``idx`` counts the file's rows from 0.

    Raises:
        UsageError: If a line, column or label is not as it should be; the message names file and line.
    """
    is_test = split in task.test_splits
    content = path.read_bytes()
    columns: dict[str, list[Any]] = {column: [] for column in features(task)}
    for line, index, row in _rows(task, path, content, is_test):
        for column, tsv_column in zip(task.text_columns, task.tsv_text_columns, strict=True):
            columns[column].append(row[tsv_column])
        columns["label"].append(UNLABELED if is_test else _label(task, row[task.tsv_label_column], f"{path}:{line}"))
        columns["idx"].append(index)
    if not columns["label"]:
        raise UsageError(f"data_dir: {path} has no rows")
    if verify:
        warn_if_different(task, split, path, len(columns["label"]), content)
    return datasets.Dataset.from_dict(columns, features=features(task), split=datasets.NamedSplit(split))


def _rows(task: GlueTask, path: Path, content: bytes, is_test: bool) -> Iterator[tuple[int, int, dict[str, str]]]:
    """Yield line, index and fields by column. No quoting: a quotation mark is text, also at the start of a field."""
    try:
        # Not splitlines(): texts may hold characters that it takes for ends of lines.
        lines = content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"data_dir: {path} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    numbered = [(number, line.removesuffix("\r")) for number, line in enumerate(lines, 1)]
    numbered = [(number, line) for number, line in numbered if line]
    if not numbered:
        raise UsageError(f"data_dir: {path} has no rows")
    has_header = task.name != "cola" or is_test
    header = tuple(numbered[0][1].split("\t")) if has_header else _COLA_COLUMNS
    needed = [*task.tsv_text_columns, *([] if is_test else [task.tsv_label_column])]
    missing = [column for column in needed if column not in header]
    if missing:
        raise UsageError(
            f"data_dir: {path} has no column {', '.join(map(repr, missing))}: its header is "
            f"{', '.join(map(repr, header))}; expected {', '.join(map(repr, needed))} among the columns"
        )
    broken = 0
    for index, (number, line) in enumerate(numbered[has_header:]):
        fields = line.split("\t")
        if task.has_broken_lines and len(fields) < len(header):
            broken += 1
            continue
        if len(fields) != len(header):
            raise UsageError(
                f"data_dir: {path}:{number} has {len(fields)} fields; expected {len(header)}, parted by tabs"
            )
        yield number, index, dict(zip(header, fields, strict=True))
    if broken:
        logger.info(f"{path}: left out {broken} broken lines, as the hub does.")


def _label(task: GlueTask, text: str, place: str) -> int | float:
    if task.is_regression:
        return _score(task, text, place)
    if text not in task.tsv_labels:
        accepted = ", ".join(map(repr, task.tsv_labels))
        raise UsageError(f"data_dir: {place}: {task.tsv_label_column}={text!r}; expected one of {accepted}")
    return task.tsv_labels.index(text)


def _score(task: GlueTask, text: str, place: str) -> float:
    low, high = task.score_range
    try:
        score = float(text)
    except ValueError:
        score = float("nan")
    if not low <= score <= high:
        raise UsageError(
            f"data_dir: {place}: {task.tsv_label_column}={text!r}; expected a number from {low:g} to {high:g}"
        )
    return score
