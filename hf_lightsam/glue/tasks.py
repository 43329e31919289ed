"""The tasks of GLUE, as in ``nyu-mll/glue`` and in the official files, and what is known of any text task."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from ..errors import UsageError

UNLABELED = -1
"""The label of rows without one, such as GLUE's test rows, as on the hub."""


@dataclass(frozen=True)
class TextTask:
    """A text classification or regression: what model, tokenizer and metrics have to know of it.

    Attributes:
        name: Short name, for file names and the model's configuration.
        text_columns: Text columns: one, or two for a pair.
        labels: Names of the classes in order of their ids; empty for regression.
        metrics: Names of the metrics, of :data:`~hf_lightsam.glue.metrics.METRICS`; the first picks the best model.
        validation_splits: Names of the development splits.
        test_splits: Names of the test splits.
    """

    name: str
    text_columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ("test",)

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of a model for the task: the number of classes, or 1 for a score."""
        return len(self.labels) or 1


@dataclass(frozen=True, kw_only=True)
class GlueTask(TextTask):
    """One task of GLUE: also how its official files name and write what it has.

    Attributes:
        folder: Folder of the official download.
        tsv_text_columns: The text columns in the headers of the TSV files.
        tsv_label_column: The label's column there; test files have none.
        tsv_labels: What the TSV files write for each class, in the order of ``labels``.
        score_range: Range of the scores, for regression.
        training_task: The task whose model answers, for a set without training rows.
        has_broken_lines: Whether official files have lines of too few fields: QQP's have, and the hub leaves them out.
        files: Where the one file of a task lies in the download, if that is not ``folder/split.tsv``.
    """

    folder: str
    tsv_text_columns: tuple[str, ...]
    tsv_label_column: str = "label"
    tsv_labels: tuple[str, ...] = ()
    score_range: tuple[float, float] = (0.0, 5.0)
    training_task: str | None = None
    has_broken_lines: bool = False
    files: tuple[str, ...] = ()

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of all splits, in the order train, validation, test."""
        train = () if self.training_task else ("train",)
        return (*train, *self.validation_splits, *self.test_splits)

    def file_name(self, split: str) -> str:
        """Return the name of the TSV file of a split: ``dev_matched.tsv`` for ``validation_matched``."""
        if self.files:
            return PurePosixPath(self.files[0]).name
        return f"{split.replace('validation', 'dev')}.tsv"


_NUMBERS = ("0", "1")
_ENTAILMENT = ("entailment", "not_entailment")
_INFERENCE = ("entailment", "neutral", "contradiction")
_ONE = ("sentence",)
_TWO = ("sentence1", "sentence2")

_TASKS = (
    GlueTask(
        name="cola",
        folder="CoLA",
        text_columns=_ONE,
        tsv_text_columns=_ONE,
        tsv_label_column="label",
        labels=("unacceptable", "acceptable"),
        tsv_labels=_NUMBERS,
        metrics=("matthews_correlation",),
    ),
    GlueTask(
        name="sst2",
        folder="SST-2",
        text_columns=_ONE,
        tsv_text_columns=_ONE,
        tsv_label_column="label",
        labels=("negative", "positive"),
        tsv_labels=_NUMBERS,
        metrics=("accuracy",),
    ),
    GlueTask(
        name="mrpc",
        folder="MRPC",
        text_columns=_TWO,
        tsv_text_columns=("#1 String", "#2 String"),
        tsv_label_column="Quality",
        labels=("not_equivalent", "equivalent"),
        tsv_labels=_NUMBERS,
        metrics=("f1", "accuracy"),
    ),
    GlueTask(
        name="stsb",
        folder="STS-B",
        text_columns=_TWO,
        tsv_text_columns=_TWO,
        tsv_label_column="score",
        labels=(),
        metrics=("pearson", "spearmanr"),
    ),
    GlueTask(
        name="qqp",
        folder="QQP",
        text_columns=("question1", "question2"),
        tsv_text_columns=("question1", "question2"),
        tsv_label_column="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        tsv_labels=_NUMBERS,
        has_broken_lines=True,
        metrics=("f1", "accuracy"),
    ),
    GlueTask(
        name="mnli",
        folder="MNLI",
        text_columns=("premise", "hypothesis"),
        tsv_text_columns=_TWO,
        tsv_label_column="gold_label",
        labels=_INFERENCE,
        tsv_labels=_INFERENCE,
        metrics=("accuracy",),
        validation_splits=("validation_matched", "validation_mismatched"),
        test_splits=("test_matched", "test_mismatched"),
    ),
    GlueTask(
        name="qnli",
        folder="QNLI",
        text_columns=("question", "sentence"),
        tsv_text_columns=("question", "sentence"),
        tsv_label_column="label",
        labels=_ENTAILMENT,
        tsv_labels=_ENTAILMENT,
        metrics=("accuracy",),
    ),
    GlueTask(
        name="rte",
        folder="RTE",
        text_columns=_TWO,
        tsv_text_columns=_TWO,
        tsv_label_column="label",
        labels=_ENTAILMENT,
        tsv_labels=_ENTAILMENT,
        metrics=("accuracy",),
    ),
    GlueTask(
        name="wnli",
        folder="WNLI",
        text_columns=_TWO,
        tsv_text_columns=_TWO,
        tsv_label_column="label",
        labels=("not_entailment", "entailment"),
        tsv_labels=_NUMBERS,
        metrics=("accuracy",),
    ),
)

TASKS: dict[str, GlueTask] = {task.name: task for task in _TASKS}
"""The nine tasks by name."""

DIAGNOSTIC = GlueTask(
    name="ax",
    folder="diagnostic",
    text_columns=("premise", "hypothesis"),
    tsv_text_columns=_TWO,
    labels=_INFERENCE,
    tsv_labels=_INFERENCE,
    metrics=("matthews_correlation",),
    validation_splits=(),
    training_task="mnli",
    files=("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX.tsv", "diagnostic.tsv", "ax/test.tsv"),
)
"""The diagnostic set AX: test rows only, answered by a model trained on MNLI; no part of the GLUE average."""


def normalized(name: str) -> str:
    """Return a name without case, hyphens and underscores: ``SST-2``, ``sst_2`` and ``sst2`` are one."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> GlueTask:
    """Return a task, or the diagnostic set ``ax``, by its name in any of the usual spellings.

    Raises:
        UsageError: For a name that is none of them.
    """
    task = {**TASKS, DIAGNOSTIC.name: DIAGNOSTIC}.get(normalized(name))
    if task is None:
        raise UsageError(f"task_name={name!r}: expected one of {', '.join(TASKS)}, or {DIAGNOSTIC.name}")
    return task
