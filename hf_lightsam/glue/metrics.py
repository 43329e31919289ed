"""GLUE's official metrics, as a module of ``evaluate`` that needs no download."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import EvalPrediction

from hf_lightsam.errors import UsageError
from hf_lightsam.glue.tasks import TASKS, GlueTask, get_task

_DESCRIPTION = "The official metrics of the GLUE tasks (Wang et al., arXiv 1804.07461)."
_INPUTS = """
Args:
    predictions: Predicted class ids, or scores for stsb.
    references: True class ids, or scores.
Returns:
    cola: matthews_correlation; mrpc, qqp: f1 and accuracy; stsb: pearson and spearmanr; others: accuracy.
"""


def _correlation(function: Callable[..., Any], references: np.ndarray, predictions: np.ndarray) -> float:
    """Return a correlation, 0 where it is undefined: of fewer than two rows, or of a constant."""
    if len(references) < 2 or np.ptp(references) == 0 or np.ptp(predictions) == 0:
        return 0.0
    return float(function(references, predictions).statistic)


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda references, predictions: float(accuracy_score(references, predictions)),
    "f1": lambda references, predictions: float(f1_score(references, predictions, zero_division=0.0)),
    "matthews_correlation": lambda references, predictions: float(matthews_corrcoef(references, predictions)),
    "pearson": lambda references, predictions: _correlation(pearsonr, references, predictions),
    "spearmanr": lambda references, predictions: _correlation(spearmanr, references, predictions),
}


def glue_metrics(task: GlueTask, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
    """Compute a task's official metrics, by scikit-learn and SciPy.

    Args:
        task: The task.
        predictions: Class ids, or scores for a regression task; one a row.
        references: The true ones.

    Returns:
        Each of ``task.metrics``. A metric that is undefined, as for constant predictions, is 0.

    Raises:
        UsageError: Without rows, for different lengths, or for scores that are not finite.
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    if len(true) == 0 or predicted.shape != true.shape:
        raise UsageError(
            f"predictions, references: shapes {predicted.shape} and {true.shape}; expected one value a row in both, of "
            "at least one row"
        )
    if not (np.all(np.isfinite(predicted)) and np.all(np.isfinite(true))):
        raise UsageError("predictions, references: expected finite numbers; some are infinite or NaN")
    return {name: _METRICS[name](true, predicted) for name in task.metrics}


class GlueMetric(evaluate.Metric):
    """The metrics of one task for ``evaluate``: ``GlueMetric("cola")``, or ``evaluate.load`` of this file's path."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in TASKS:
            raise UsageError(f"config_name={self.config_name!r}: expected one of {', '.join(TASKS)}")
        kind = "float32" if get_task(self.config_name).is_regression else "int64"
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="@inproceedings{wang2019glue, title={{GLUE}: A Multi-Task Benchmark and Analysis Platform}}",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Value(kind), "references": datasets.Value(kind)}),
        )

    def _compute(self, predictions: Sequence[Any], references: Sequence[Any]) -> dict[str, float]:
        return glue_metrics(get_task(self.config_name), predictions, references)


def make_compute_metrics(task: GlueTask) -> Callable[[EvalPrediction], dict[str, float]]:
    """Return a function for ``Trainer(compute_metrics=...)``: from logits to the task's metrics."""
    metric = GlueMetric(task.name, keep_in_memory=True)

    def compute_metrics(prediction: EvalPrediction) -> dict[str, float]:
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        predicted = np.squeeze(logits, axis=-1) if task.is_regression else np.argmax(logits, axis=-1)
        computed = metric.compute(predictions=predicted, references=prediction.label_ids)
        assert computed is not None
        return computed

    return compute_metrics
