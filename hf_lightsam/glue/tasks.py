"""The nine tasks of GLUE: columns, labels, files and metrics, as in ``nyu-mll/glue`` and in the official files."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UsageError


@dataclass(frozen=True)
class GlueTask:
    """One task.

    Attributes:
        name: Name on the command line and of the configuration of ``nyu-mll/glue``.
        folder: Folder of the official download.
        text_columns: Text columns, as the hub names them: one, or two for a pair.
        tsv_text_columns: The same columns in the headers of the TSV files.
        tsv_label_column: The label's column there; test files have none.
        labels: Names of the classes in order of their ids; empty for regression.
        tsv_labels: What the TSV files write for each class, in the same order.
        metrics: The official metrics; the first picks the best model.
        split_suffixes: Suffixes of the development and test splits: MNLI has two of each.
        score_range: Range of the scores, for regression.
    """

    name: str
    folder: str
    text_columns: tuple[str, ...]
    tsv_text_columns: tuple[str, ...]
    tsv_label_column: str
    labels: tuple[str, ...]
    tsv_labels: tuple[str, ...]
    metrics: tuple[str, ...]
    split_suffixes: tuple[str, ...] = ("",)
    score_range: tuple[float, float] = (0.0, 5.0)

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Outputs of a model for the task: the number of classes, or 1 for a score."""
        return len(self.labels) or 1

    @property
    def validation_splits(self) -> tuple[str, ...]:
        """Names of the development splits."""
        return tuple(f"validation{suffix}" for suffix in self.split_suffixes)

    @property
    def test_splits(self) -> tuple[str, ...]:
        """Names of the test splits."""
        return tuple(f"test{suffix}" for suffix in self.split_suffixes)

    def file_name(self, split: str) -> str:
        """Return the name of the TSV file of a split: ``dev_matched.tsv`` for ``validation_matched``."""
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
        tsv_labels=(),
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
        split_suffixes=("_matched", "_mismatched"),
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
"""The tasks by name."""


def normalized(name: str) -> str:
    """Return a name without case, hyphens and underscores: ``SST-2``, ``sst_2`` and ``sst2`` are one."""
    return name.lower().replace("-", "").replace("_", "")


def get_task(name: str) -> GlueTask:
    """Return a task by its name, in any of the usual spellings.

    Raises:
        UsageError: For a name that is none of them.
    """
    task = TASKS.get(normalized(name))
    if task is None:
        raise UsageError(f"task_name={name!r}: expected one of {', '.join(TASKS)}")
    return task
