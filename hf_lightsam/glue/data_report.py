"""What is remarkable about rows: their classes, repeated texts, empty texts, and what truncation takes from them.

Each report is a frozen dataclass of numbers, and ``str`` of it is the line to print. Rows are counted from 1, as a
person counts the rows of a file below its header; where rows have a column ``idx``, it tells the row of the file, also
after other rows were dropped or split off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from .tasks import UNLABELED, TextTask

IMBALANCED = 0.8
"""Share of the largest class above which a report warns."""

SHOWN = 5
"""Row numbers that a report names."""


@dataclass(frozen=True)
class TruncationReport:
    """What was cut off a split's rows.

    Attributes:
        split: The split's name.
        rows: Its rows.
        rows_cut: Those of them that were longer than ``max_length``.
        tokens: Tokens of all rows before, special tokens included.
        tokens_lost: Those of them that were cut off.
        longest: Tokens of the longest row, before.
        max_length: Tokens that a row may have.
    """

    split: str
    rows: int
    rows_cut: int
    tokens: int
    tokens_lost: int
    longest: int
    max_length: int

    @classmethod
    def of(cls, split: str, lengths: np.ndarray, max_length: int) -> TruncationReport:
        """Make the report of rows with these numbers of tokens before truncation; shape ``(rows,)``."""
        lost = np.maximum(np.asarray(lengths, dtype=np.int64) - max_length, 0)
        return cls(
            split=split,
            rows=len(lost),
            rows_cut=int(np.count_nonzero(lost)),
            tokens=int(np.sum(lengths)),
            tokens_lost=int(lost.sum()),
            longest=int(np.max(lengths, initial=0)),
            max_length=max_length,
        )

    def __str__(self) -> str:
        if not self.rows_cut:
            return f"{self.split}: no row was cut; the longest has {self.longest} of at most {self.max_length} tokens"
        return (
            f"{self.split}: {_share(self.rows_cut, self.rows)} rows were cut to {self.max_length} tokens, and "
            f"{_share(self.tokens_lost, self.tokens)} tokens were lost; the longest row had {self.longest} tokens"
        )


@dataclass(frozen=True)
class ClassReport:
    """How many rows of a split each class has.

    Attributes:
        split: The split's name.
        counts: Pairs of class name and rows, in order of the ids.
    """

    split: str
    counts: tuple[tuple[str, int], ...]

    @property
    def majority(self) -> tuple[str, float]:
        """The largest class and its share: the accuracy of always answering it."""
        name, count = max(self.counts, key=lambda pair: pair[1])
        return name, count / sum(count for _, count in self.counts)

    @property
    def absent(self) -> tuple[str, ...]:
        """Classes without a row."""
        return tuple(name for name, count in self.counts if not count)

    @property
    def is_remarkable(self) -> bool:
        """Whether a class is absent, or one has more than :data:`IMBALANCED` of the rows."""
        return bool(self.absent) or self.majority[1] > IMBALANCED

    def __str__(self) -> str:
        line = f"{self.split}: " + ", ".join(f"{name!r} {count:,}" for name, count in self.counts)
        if self.absent:
            line += f"; no rows of {', '.join(map(repr, self.absent))}"
        name, share = self.majority
        if share > IMBALANCED:
            line += (
                f"; always answering {name!r} has an accuracy of {share:.3f}: look at balanced_accuracy, f1_macro or "
                "matthews_correlation too"
            )
        return line


@dataclass(frozen=True)
class RepetitionReport:
    """Rows of a split whose texts come more than once in it. Texts are the same if they are, without outer blanks.

    Attributes:
        split: The split's name.
        rows: Its rows.
        repeated: Rows whose texts an earlier row has.
        contradictory: Rows whose texts come with another label, too.
        first: The first few repeated rows, contradictory ones first.
    """

    split: str
    rows: int
    repeated: int
    contradictory: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        line = f"{self.split}: {_share(self.repeated, self.rows)} rows repeat the texts of an earlier row"
        if self.contradictory:
            line += f"; {self.contradictory:,} rows have texts that come with another label, too"
        return f"{line} (rows {_listed(self.first)})"


@dataclass(frozen=True)
class OverlapReport:
    """Rows of an evaluation split whose texts are also in the training split: what is measured on them is memory.

    Attributes:
        split: The evaluation split's name.
        rows: Its rows.
        shared: Those whose texts are in the training split, too.
        contradictory: Those of them that have another label there.
        first: The first few of them: row of the evaluation split, row of the training split.
    """

    split: str
    rows: int
    shared: int
    contradictory: int
    first: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        pairs = _listed(tuple(f"{row} (train {train})" for row, train in self.first))
        return (
            f"{self.split}: {_share(self.shared, self.rows)} rows are also in train, {self.contradictory:,} of them "
            f"with another label (rows {pairs}): what is measured on them is memory, not generalization"
        )


@dataclass(frozen=True)
class BlankReport:
    """Rows of a split without text in a column: missing, empty, or nothing but blanks.

    Attributes:
        split: The split's name.
        column: The column.
        blank: How many.
        first: The first few.
    """

    split: str
    column: str
    blank: int
    first: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.split}: {self.blank:,} without text in {self.column!r} (rows {_listed(self.first)})"


@dataclass(frozen=True)
class DataReport:
    """All of the reports on a task's rows that have something to tell, and the class counts of all labeled splits."""

    classes: tuple[ClassReport, ...]
    blanks: tuple[BlankReport, ...]
    repetitions: tuple[RepetitionReport, ...]
    overlaps: tuple[OverlapReport, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What one should know before believing a result, a line each."""
        remarkable = [report for report in self.classes if report.is_remarkable]
        contradictory = [report for report in self.repetitions if report.contradictory]
        return tuple(map(str, [*remarkable, *self.blanks, *contradictory, *self.overlaps]))

    def __str__(self) -> str:
        return "\n".join(map(str, [*self.classes, *self.blanks, *self.repetitions, *self.overlaps]))


def report_rows(rows: datasets.DatasetDict, task: TextTask) -> DataReport:
    """Look at a task's rows before they are tokenized.

    It takes a few seconds for 400,000 pairs. What truncation takes is known only after tokenizing:
    :func:`~hf_lightsam.glue.preprocessing.tokenize`.

    Args:
        rows: From :func:`~hf_lightsam.glue.load_glue` or :func:`~hf_lightsam.glue.load_own_data`.
        task: Their task.
    """
    columns = {str(split): _Columns(part, task) for split, part in rows.items()}
    evaluations = [split for split in columns if split != "train"] if "train" in columns else []
    repetitions = [_repetitions(split, column) for split, column in columns.items()]
    overlaps = [_overlap(split, columns[split], columns["train"]) for split in evaluations]
    return DataReport(
        classes=tuple(
            _classes(split, column.labels, task)
            for split, column in columns.items()
            if not task.is_regression and column.is_labeled
        ),
        blanks=tuple(report for split, part in rows.items() for report in _blanks(str(split), part, task)),
        repetitions=tuple(report for report in repetitions if report.repeated),
        overlaps=tuple(report for report in overlaps if report.shared),
    )


def is_blank(value: Any) -> bool:
    """Say whether a text or label is missing (None, NaN), empty, or nothing but blanks."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def row_numbers(rows: datasets.Dataset) -> np.ndarray:
    """Return the numbers, from 1, that a person would look the rows up by in their file; shape ``(rows,)``."""
    if "idx" in rows.column_names:
        return np.asarray(rows["idx"][:], dtype=np.int64) + 1
    return np.arange(1, len(rows) + 1)


class _Columns:
    """A split's columns as Python and NumPy hold them, read once."""

    def __init__(self, rows: datasets.Dataset, task: TextTask) -> None:
        texts = [[(text or "").strip() for text in rows[column][:]] for column in task.text_columns]
        self.texts = list(zip(*texts, strict=True))
        self.labels = np.asarray(rows["label"][:])
        self.is_labeled = bool((self.labels != UNLABELED).any())
        self.numbers = row_numbers(rows)


def _classes(split: str, labels: np.ndarray, task: TextTask) -> ClassReport:
    counts = np.bincount(labels[labels >= 0], minlength=task.num_labels)
    return ClassReport(split, tuple(zip(task.labels, map(int, counts), strict=True)))


def _blanks(split: str, rows: datasets.Dataset, task: TextTask) -> list[BlankReport]:
    reports = []
    for column in task.text_columns:
        blank = [index for index, text in enumerate(rows[column][:]) if is_blank(text)]
        if blank:
            first = row_numbers(rows)[blank[:SHOWN]]
            reports.append(BlankReport(split, column, len(blank), tuple(map(int, first))))
    return reports


def _repetitions(split: str, columns: _Columns) -> RepetitionReport:
    counts = Counter(columns.texts)
    repeated = [index for index, text in enumerate(columns.texts) if counts[text] > 1]
    labels_of = _labels_by_text(columns, {columns.texts[index] for index in repeated})
    contradictory = [index for index in repeated if len(labels_of[columns.texts[index]]) > 1]
    return RepetitionReport(
        split=split,
        rows=len(columns.texts),
        repeated=len(columns.texts) - len(counts),
        contradictory=len(contradictory),
        first=tuple(int(columns.numbers[index]) for index in (contradictory or repeated)[:SHOWN]),
    )


def _overlap(split: str, evaluation: _Columns, train: _Columns) -> OverlapReport:
    labels_of = _labels_by_text(train, set(evaluation.texts))
    place = {text: index for index, text in reversed(list(enumerate(train.texts))) if text in labels_of}
    shared = [index for index, text in enumerate(evaluation.texts) if text in labels_of]
    contradictory = [
        index for index in shared if labels_of[evaluation.texts[index]] != {evaluation.labels[index].item()}
    ]
    return OverlapReport(
        split=split,
        rows=len(evaluation.texts),
        shared=len(shared),
        contradictory=len(contradictory) if evaluation.is_labeled else 0,
        first=tuple(
            (int(evaluation.numbers[index]), int(train.numbers[place[evaluation.texts[index]]]))
            for index in shared[:SHOWN]
        ),
    )


def _labels_by_text(columns: _Columns, texts: Set[tuple[str, ...]]) -> dict[tuple[str, ...], set[float]]:
    """Return the labels that each of the texts has, for those that occur."""
    labels: dict[tuple[str, ...], set[float]] = {}
    for text, label in zip(columns.texts, columns.labels.tolist(), strict=True):
        if text in texts:
            labels.setdefault(text, set()).add(label)
    return labels


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} ({part / whole:.1%})"


def _listed(rows: Sequence[object]) -> str:
    """Return the first few row numbers as text."""
    return ", ".join(map(str, rows)) + (", ..." if len(rows) == SHOWN else "")
