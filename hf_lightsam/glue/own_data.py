"""One's own rows, from CSV, TSV, JSON or parquet files, in the form of GLUE's."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split
from transformers.utils import logging

from ..errors import UsageError
from .data_report import SHOWN, is_blank
from .metrics import check_metrics, default_metrics
from .tasks import UNLABELED, TextTask

logger = logging.get_logger(__name__)

FORMATS = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""The file formats that are read, by the files' suffix."""

FEW_NUMBERS = 20
"""Whole numbers in the label column up to which they are taken for classes unless one says otherwise."""

_OWN_COLUMNS = ("label", "idx")


def load_own_data(
    train_file: str | Path,
    validation_file: str | Path | None = None,
    test_file: str | Path | None = None,
    *,
    text_columns: Sequence[str],
    label_column: str,
    validation_share: float = 0.1,
    regression: bool | None = None,
    class_names: Sequence[str] | None = None,
    metrics: Sequence[str] | None = None,
    on_missing: Literal["error", "drop"] = "error",
    seed: int = 42,
) -> tuple[TextTask, datasets.DatasetDict]:
    """Load files of one's own, and find out what task they are.

    CSV is read as RFC 4180 has it: a field may be in quotation marks. In TSV, as in GLUE's files, a quotation mark is
    text. JSON is one object a line, or one list of objects. The files may be of different formats; columns that are not
    named do not matter.

    Args:
        train_file: The rows to train on.
        validation_file: The rows to evaluate on. None: a share of the training rows, split off with ``seed``; of every
            class as large a share.
        test_file: The rows to predict. Its label column may be missing or empty.
        text_columns: The column of the text, or the two of a pair.
        label_column: The column of the label.
        validation_share: That share, above 0 and below 1.
        regression: Whether the label is a score. None: numbers with a fraction are scores; up to 20 different whole
            numbers, and anything that is not a number, are classes; of more whole numbers one has to say what they are.
            What was found out is logged.
        class_names: The classes as the files write them, in the order of their ids. None: those of the training rows,
            sorted: numbers by value, words by code points.
        metrics: Names of :data:`~hf_lightsam.glue.metrics.METRICS`; the first picks the best model. None: accuracy, f1
            and matthews_correlation for two classes, accuracy and f1_macro for more, pearson and spearmanr for scores.
        on_missing: What to do about rows whose text or label is missing, empty, or nothing but blanks: ``"error"``
            names them, ``"drop"`` leaves them out and logs them.
        seed: Seed of the split.

    Returns:
        The task, named after the training file, and the splits ``train``, ``validation`` and, if there is a test file,
        ``test``, with the text columns, ``label`` and ``idx``: the row of the file, counted from 0. Rows without label
        have -1.

    Raises:
        UsageError: If an argument, a file, a column or a row is not as it should be; the message names it.
    """
    _check_arguments(text_columns, label_column, validation_share, on_missing)
    paths = {"train": train_file, "validation": validation_file, "test": test_file}
    tables = {
        split: _read(f"{split}_file", Path(path), text_columns, label_column, label_is_needed=split != "test")
        for split, path in paths.items()
        if path is not None
    }
    tables = {split: table.without_blanks(on_missing) for split, table in tables.items()}
    train = tables["train"]
    labels = None if _is_regression(train, regression, class_names) else _classes(train, class_names)
    num_labels = 1 if labels is None else len(labels)
    names = tuple(metrics) if metrics is not None else default_metrics(num_labels)
    check_metrics(names, num_labels)
    task = TextTask(
        name=Path(train_file).stem,
        text_columns=tuple(text_columns),
        labels=tuple(labels or ()),
        metrics=names,
        test_splits=("test",) if test_file is not None else (),
    )
    rows = datasets.DatasetDict({split: table.rows(task) for split, table in tables.items()})
    if validation_file is None:
        rows["train"], rows["validation"] = _split(rows["train"], task, validation_share, seed)
    what = "a score" if task.is_regression else f"{num_labels} classes: {dict(enumerate(task.labels))}"
    logger.info(f"label_column={label_column!r}: {what}; metrics: {', '.join(names)}")
    return task, rows


def _check_arguments(text_columns: Sequence[str], label_column: str, validation_share: float, on_missing: str) -> None:
    if isinstance(text_columns, str) or len(text_columns) not in (1, 2) or len(set(text_columns)) != len(text_columns):
        raise UsageError(f"text_columns={text_columns!r}: expected the name of one column, or of two for a pair")
    if label_column in text_columns:
        raise UsageError(f"label_column={label_column!r}: is also one of text_columns; expected another column")
    for column in text_columns:
        if column in _OWN_COLUMNS:
            raise UsageError(f"text_columns={column!r}: the loaded rows have a column of this name; expected another")
    if not 0 < validation_share < 1:
        raise UsageError(f"validation_share={validation_share!r}: expected a number above 0 and below 1")
    if on_missing not in ("error", "drop"):
        raise UsageError(f"on_missing={on_missing!r}: expected 'error' or 'drop'")


@dataclass(frozen=True)
class _Table:
    """The columns that matter of one file.

    ``labels`` is None if it has none. ``numbers`` are the rows' places in the file, counted from 0.
    """

    argument: str
    path: Path
    label_column: str
    texts: dict[str, list[Any]]
    labels: list[Any] | None
    numbers: list[int]

    def place(self, index: int) -> str:
        """Name a row as a person finds it."""
        return f"{self.argument}={str(self.path)!r}: {_row_name(self.path)} {self.numbers[index] + 1}"

    def without_blanks(self, on_missing: str) -> _Table:
        """Return the rows in which nothing is missing; raise if there are others and they are not to be dropped."""
        columns = {**self.texts, **({} if self.labels is None else {self.label_column: self.labels})}
        blank = {
            column: [index for index, value in enumerate(values) if is_blank(value)]
            for column, values in columns.items()
        }
        bad = sorted({index for indices in blank.values() for index in indices})
        if not bad:
            return self
        told = "; ".join(
            f"{len(indices):,} in {column!r} ({_row_name(self.path)}s "
            f"{', '.join(str(self.numbers[index] + 1) for index in indices[:SHOWN])}"
            f"{', ...' if len(indices) > SHOWN else ''})"
            for column, indices in blank.items()
            if indices
        )
        told = f"{self.argument}={str(self.path)!r}: missing or empty values: {told}"
        if on_missing == "error":
            raise UsageError(f"{told}; expected a value everywhere, or on_missing='drop' to leave these rows out")
        dropped = set(bad)
        kept = [index for index in range(len(self.numbers)) if index not in dropped]
        if not kept:
            raise UsageError(f"{told}; no row is left")
        logger.warning(f"{told}; {len(bad):,} of {len(self.numbers):,} rows left out")
        return replace(
            self,
            texts={column: [values[index] for index in kept] for column, values in self.texts.items()},
            labels=None if self.labels is None else [self.labels[index] for index in kept],
            numbers=[self.numbers[index] for index in kept],
        )

    def rows(self, task: TextTask) -> datasets.Dataset:
        """Return the rows in the form of GLUE's."""
        kind = datasets.Value("float32") if task.is_regression else datasets.ClassLabel(names=list(task.labels))
        texts = {column: datasets.Value("string") for column in task.text_columns}
        columns = {**self.texts, "label": self._ids(task), "idx": self.numbers}
        return datasets.Dataset.from_dict(
            columns, features=datasets.Features({**texts, "label": kind, "idx": datasets.Value("int32")})
        )

    def _ids(self, task: TextTask) -> list[int] | list[float]:
        if self.labels is None:
            return [UNLABELED] * len(self.numbers)
        if task.is_regression:
            return [self._score(index) for index in range(len(self.labels))]
        ids = {name: index for index, name in enumerate(task.labels)}
        names = [_class_name(label) for label in self.labels]
        for index, name in enumerate(names):
            if name not in ids:
                raise UsageError(
                    f"{self.place(index)}: {self.label_column}={name!r}; expected one of the classes of the training "
                    f"rows, or of class_names: {', '.join(map(repr, task.labels))}"
                )
        return [ids[name] for name in names]

    def _score(self, index: int) -> float:
        assert self.labels is not None
        score = _number(self.labels[index])
        if score is None or not math.isfinite(score):
            raise UsageError(f"{self.place(index)}: {self.label_column}={self.labels[index]!r}; expected a number")
        if abs(score) > float(np.finfo(np.float32).max):  # which the rows, and the model, have
            raise UsageError(
                f"{self.place(index)}: {self.label_column}={self.labels[index]!r}; expected a finite number of 32 bits"
            )
        return score


def _row_name(path: Path) -> str:
    """Say what is counted: in a file with a header, its rows below that."""
    return "data row" if path.suffix.lower() in (".csv", ".tsv") else "row"


# ---- Reading ---------------------------------------------------------------------------------------------------------


def _read(argument: str, path: Path, text_columns: Sequence[str], label_column: str, label_is_needed: bool) -> _Table:
    given = f"{argument}={str(path)!r}"
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{given}: expected a file that ends in {', '.join(FORMATS)}")
    if not path.is_file():
        raise UsageError(f"{given}: no such file")
    try:
        columns = reader(path, [*text_columns, label_column])
    except UnicodeDecodeError as error:
        raise UsageError(f"{given}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (OSError, ValueError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise UsageError(f"{given}: cannot be read as {path.suffix[1:]}: {error.__cause__ or error}") from error
    needed = [*text_columns, *([label_column] if label_is_needed else [])]
    for name in needed:
        if name not in columns.names:
            which = "label_column" if name == label_column else "text_columns"
            raise UsageError(f"{which}={name!r}: {path} has no such column (found: {', '.join(columns.names)})")
    num_rows = len(columns.values[text_columns[0]])
    if not num_rows:
        raise UsageError(f"{given}: has no rows")
    table = _Table(
        argument,
        path,
        label_column,
        {name: columns.values[name] for name in text_columns},
        _labels_or_none(columns.values.get(label_column), label_is_needed),
        list(range(num_rows)),
    )
    for name, values in table.texts.items():
        for index, value in enumerate(values):
            if not isinstance(value, str) and not is_blank(value):
                raise UsageError(f"{table.place(index)}: {name}={value!r}; expected text")
    return table


def _labels_or_none(labels: list[Any] | None, label_is_needed: bool) -> list[Any] | None:
    """Return None also for a label column that nobody filled in, where none is needed."""
    return labels if label_is_needed or not all(map(is_blank, labels or [])) else None


@dataclass(frozen=True)
class _Columns:
    """All of a file's column names, and the values of those that were asked for."""

    names: list[str]
    values: dict[str, list[Any]]


def _read_separated(path: Path, wanted: Sequence[str]) -> _Columns:
    is_csv = path.suffix.lower() == ".csv"
    frame = pd.read_csv(
        path,
        sep="," if is_csv else "\t",
        quoting=csv.QUOTE_MINIMAL if is_csv else csv.QUOTE_NONE,
        dtype=str,
        keep_default_na=False,  # "NA", "null" and "None" are words; what is empty is found later
        skip_blank_lines=False,  # or row numbers would not be those of the file
        encoding="utf-8-sig",
    )
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes surplus fields for an index
        raise ValueError("its rows have more fields than its header")
    (written,) = np.nonzero((frame != "").any(axis="columns"))
    frame = frame.iloc[: written.max(initial=-1) + 1]  # blank lines at the end are no rows
    return _Columns(list(map(str, frame.columns)), {name: frame[name].tolist() for name in wanted if name in frame})


def _read_by_datasets(path: Path, wanted: Sequence[str]) -> _Columns:
    builder = "parquet" if path.suffix.lower() == ".parquet" else "json"
    if not path.stat().st_size:  # Datasets says nothing that helps
        return _Columns(list(wanted), {name: [] for name in wanted})
    rows = datasets.load_dataset(builder, data_files=str(path), split="train")
    values = {name: rows[name][:] for name in wanted if name in rows.column_names}
    for name, kind in rows.features.items():
        if name in values and isinstance(kind, datasets.ClassLabel):  # a parquet file that Datasets wrote
            values[name] = [None if value is None or value < 0 else kind.int2str(value) for value in values[name]]
    return _Columns(rows.column_names, values)


_READERS: dict[str, Callable[[Path, Sequence[str]], _Columns]] = {
    ".csv": _read_separated,
    ".tsv": _read_separated,
    ".json": _read_by_datasets,
    ".jsonl": _read_by_datasets,
    ".parquet": _read_by_datasets,
}


# ---- Labels ----------------------------------------------------------------------------------------------------------


def _number(label: Any) -> float | None:
    if isinstance(label, bool):
        return None
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def _class_name(label: Any) -> str:
    """Return the name of a class: what the file has, but whole numbers without a fraction (1.0 is 1)."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return re.sub(r"^(-?(?:0|[1-9]\d*))\.0+$", r"\1", str(label).strip())


def _is_regression(train: _Table, asked: bool | None, class_names: Sequence[str] | None) -> bool:
    if asked and class_names is not None:
        raise UsageError(
            f"class_names={list(class_names)!r}: a score has no classes; expected none with regression=True"
        )
    if asked is not None or class_names is not None:
        return bool(asked)
    assert train.labels is not None
    numbers = [_number(label) for label in train.labels]
    if any(number is None or not math.isfinite(number) for number in numbers):
        return False
    found = f"label_column={train.label_column!r}"
    different = len(set(map(_class_name, train.labels)))
    if not all(number is not None and number.is_integer() for number in numbers):
        logger.warning(f"{found}: numbers with a fraction are taken for scores; regression=False makes them classes")
        return True
    if different > FEW_NUMBERS:
        raise UsageError(
            f"{found}: {different:,} different whole numbers may be classes or scores; expected regression=True or "
            "regression=False"
        )
    logger.warning(f"{found}: {different} whole numbers are taken for classes; regression=True makes them scores")
    return False


def _classes(train: _Table, class_names: Sequence[str] | None) -> list[str]:
    assert train.labels is not None
    found = {_class_name(label) for label in train.labels}
    if class_names is not None:
        names = [_class_name(name) for name in class_names]
        if len(set(names)) != len(names) or len(names) < 2 or any(map(is_blank, names)):
            raise UsageError(
                f"class_names={list(class_names)!r}: expected two or more names, all different and not blank"
            )
        return names
    if len(found) < 2:
        raise UsageError(
            f"label_column={train.label_column!r}: all rows of {train.path} have the label {found.pop()!r}; expected "
            "two classes or more"
        )
    are_numbers = all(_number(name) is not None for name in found)
    return sorted(found, key=lambda name: (_number(name) if are_numbers else 0.0, name))


def _split(
    rows: datasets.Dataset, task: TextTask, share: float, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    labels = None if task.is_regression else rows["label"][:]
    try:
        train, validation = train_test_split(np.arange(len(rows)), test_size=share, random_state=seed, stratify=labels)
    except ValueError as error:
        raise UsageError(
            f"validation_share={share!r}: no such share of every class can be split off {len(rows)} rows ({error}); "
            "expected validation_file, another share, or more rows of the rare classes"
        ) from error
    return rows.select(np.sort(train)), rows.select(np.sort(validation))
