"""Metrics of text tasks, by scikit-learn and SciPy; GLUE's as a module of ``evaluate``, and its average."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    f1_score,
    matthews_corrcoef,
    mean_absolute_error,
    mean_squared_error,
)
from transformers import EvalPrediction

from hf_lightsam.errors import UsageError
from hf_lightsam.glue.answers import answers
from hf_lightsam.glue.tasks import TASKS, GlueTask, TextTask, get_task

_DESCRIPTION = "The official metrics of the GLUE tasks (Wang et al., arXiv 1804.07461)."
_INPUTS = """
Args:
    predictions: Predicted class ids, or scores for stsb.
    references: True class ids, or scores.
Returns:
    cola, ax: matthews_correlation; mrpc, qqp: f1 and accuracy; stsb: pearson and spearmanr; others: accuracy.
"""


@dataclass(frozen=True)
class Metric:
    """A metric.

    Attributes:
        function: From true and predicted values, each of shape ``(rows,)``, to a number; NaN where it is undefined.
        of_scores: Whether it compares scores; else class ids.
        binary_only: Whether it needs two classes, of which the second is the positive one.
        greater_is_better: As ``TrainingArguments.greater_is_better``.
    """

    function: Callable[[np.ndarray, np.ndarray], float]
    of_scores: bool = False
    binary_only: bool = False
    greater_is_better: bool = True


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def correlate(references: np.ndarray, predictions: np.ndarray) -> float:
        if len(references) < 2:  # an error in SciPy
            return float("nan")
        return float(function(references, predictions).statistic)

    return correlate


METRICS: dict[str, Metric] = {
    "accuracy": Metric(accuracy_score),
    "balanced_accuracy": Metric(balanced_accuracy_score),
    "f1": Metric(lambda true, predicted: f1_score(true, predicted, zero_division=0.0), binary_only=True),
    "f1_macro": Metric(lambda true, predicted: f1_score(true, predicted, average="macro", zero_division=0.0)),
    "matthews_correlation": Metric(matthews_corrcoef),
    "pearson": Metric(_correlation(pearsonr), of_scores=True),
    "spearmanr": Metric(_correlation(spearmanr), of_scores=True),
    "mse": Metric(mean_squared_error, of_scores=True, greater_is_better=False),
    "mae": Metric(mean_absolute_error, of_scores=True, greater_is_better=False),
}
"""The metrics by name. Those of classes are scikit-learn's, with 0 for an F1 without any positive."""


def default_metrics(num_labels: int) -> tuple[str, ...]:
    """Return the metrics of a task that names none, by its model's number of outputs (1: a score)."""
    if num_labels == 1:
        return ("pearson", "spearmanr")
    return ("accuracy", "f1", "matthews_correlation") if num_labels == 2 else ("accuracy", "f1_macro")


def check_metrics(names: Sequence[str], num_labels: int) -> None:
    """Raise a UsageError for a metric that there is not, or not for so many outputs of a model (1: a score)."""
    fitting = [
        name
        for name, metric in METRICS.items()
        if metric.of_scores == (num_labels == 1) and not (metric.binary_only and num_labels != 2)
    ]
    wrong = [name for name in names if name not in fitting]
    if wrong or not names:
        kind = "a score" if num_labels == 1 else f"{num_labels} classes"
        raise UsageError(f"metrics={', '.join(names)!r}: expected, for {kind}, some of {', '.join(fitting)}")


def task_metrics(
    task: TextTask, predictions: ArrayLike, references: ArrayLike, undefined: float = 0.0
) -> dict[str, float]:
    """Compute a task's metrics, by scikit-learn and SciPy.

    Args:
        task: The task.
        predictions: Class ids, or scores for a regression task; one a row.
        references: The true ones.
        undefined: The correlation of scores where there is none: of a constant, or of fewer than two rows. Not SciPy's
            NaN by default: ``load_best_model_at_end`` compares by ``>``, so that a NaN at the first evaluation, where a
            model may well answer a constant, would never be replaced as the best. ``math.nan`` gives SciPy's answer.

    Returns:
        Each of ``task.metrics``.

    Raises:
        UsageError: Without rows, for different lengths, or for scores that are not finite.
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    if true.ndim != 1 or len(true) == 0 or predicted.shape != true.shape:
        raise UsageError(
            f"predictions, references: shapes {predicted.shape} and {true.shape}; expected one value a row in both, of "
            "at least one row"
        )
    if not (np.all(np.isfinite(predicted)) and np.all(np.isfinite(true))):
        raise UsageError("predictions, references: expected finite numbers; some are infinite or NaN")
    if task.is_regression:  # SciPy computes in the precision that it is given
        predicted, true = predicted.astype(np.float64), true.astype(np.float64)
    with warnings.catch_warnings():  # of undefined values, which are documented above
        warnings.simplefilter("ignore")
        computed = {name: float(METRICS[name].function(true, predicted)) for name in task.metrics}
    return {name: undefined if np.isnan(value) else value for name, value in computed.items()}


glue_metrics = task_metrics
"""The older name of :func:`task_metrics`."""


class GlueMetric(evaluate.Metric):
    """The metrics of one task for ``evaluate``: ``GlueMetric("cola")``, or ``evaluate.load`` of this file's path."""

    def _info(self) -> evaluate.MetricInfo:
        kind = "float32" if get_task(self.config_name).is_regression else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="@inproceedings{wang2019glue, title={{GLUE}: A Multi-Task Benchmark and Analysis Platform}}",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return task_metrics(get_task(self.config_name), predictions, references)


def make_compute_metrics(task: TextTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function for ``Trainer(compute_metrics=...)``: from logits to the task's metrics."""

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        return task_metrics(task, answers(task, prediction.predictions), prediction.label_ids)

    return compute_metrics


def glue_average(results: Mapping[str, Mapping[str, float]], partial: bool = False) -> float:
    """Return GLUE's macro average: the mean over its nine tasks of the mean of each task's metrics.

    As in Wang et al. (arXiv 1804.07461): tasks count alike, and so do the metrics of a task that has several; MNLI is
    one task, the mean of matched and mismatched. The diagnostic set AX is no part of it.

    Args:
        results: Metrics by task, as numbers of one scale. Those of MNLI's mismatched set have ``mm_`` before their
            name. The dicts that ``Trainer.evaluate`` returns will do (``eval_accuracy``, ``eval_mm_accuracy``); other
            values in them do not matter.
        partial: Whether the average of fewer tasks is wanted.

    Raises:
        UsageError: If a task is missing and ``partial`` is off, or one lacks a metric.
    """
    by_task = {get_task(name).name: metrics for name, metrics in results.items()}
    scores = [_task_score(task, by_task[name]) for name, task in TASKS.items() if name in by_task]
    missing = [name for name in TASKS if name not in by_task]
    if missing and not (partial and scores):
        raise UsageError(
            f"results: no {', '.join(missing)}; expected all nine tasks, or partial=True for the average of some"
        )
    return statistics.fmean(scores)


def _task_score(task: GlueTask, metrics: Mapping[str, float]) -> float:
    values = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    names = [
        f"{'mm_' if split.endswith('mismatched') else ''}{metric}"
        for split in task.validation_splits
        for metric in task.metrics
    ]
    missing = [name for name in names if name not in values]
    if missing:
        raise UsageError(
            f"results[{task.name!r}]: no {', '.join(missing)} (found: {', '.join(metrics) or 'nothing'}); expected "
            f"{', '.join(names)}"
        )
    return statistics.fmean(values[name] for name in names)
