"""Metrics are scikit-learn's and SciPy's on the same predictions, degenerate ones included; GLUE's average."""

from __future__ import annotations

import math
import warnings
from typing import Any

import evaluate
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics
from transformers import EvalPrediction

from hf_lightsam.errors import UsageError
from hf_lightsam.glue import DIAGNOSTIC, TASKS, TextTask, get_task, glue_average, make_compute_metrics, task_metrics
from hf_lightsam.glue import metrics as module
from hf_lightsam.glue.metrics import METRICS, check_metrics, default_metrics

CLASSES = {
    "accuracy": sklearn_metrics.accuracy_score,
    "balanced_accuracy": sklearn_metrics.balanced_accuracy_score,
    "f1": sklearn_metrics.f1_score,
    "f1_macro": lambda true, predicted: sklearn_metrics.f1_score(true, predicted, average="macro"),
    "matthews_correlation": sklearn_metrics.matthews_corrcoef,
}
SCORES = {
    "pearson": lambda true, predicted: stats.pearsonr(true, predicted).statistic,
    "spearmanr": lambda true, predicted: stats.spearmanr(true, predicted).statistic,
    "mse": sklearn_metrics.mean_squared_error,
    "mae": sklearn_metrics.mean_absolute_error,
}


def expected(function: Any, true: Any, predicted: Any) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(function(true, predicted))


def text_task(names: tuple[str, ...], num_labels: int) -> TextTask:
    labels = () if num_labels == 1 else tuple(map(str, range(num_labels)))
    return TextTask("own", ("text",), labels, names)


@st.composite
def class_ids(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """Any predictions of one to three classes: constant ones and a single row are among them."""
    num_labels = draw(st.integers(2, 3))
    size = draw(st.integers(1, 8))
    ids = st.lists(st.integers(0, num_labels - 1), min_size=size, max_size=size)
    return num_labels, draw(ids), draw(ids)


@settings(max_examples=150, deadline=None)
@given(class_ids())
def test_class_metrics_are_those_of_scikit_learn(drawn: tuple[int, list[int], list[int]]) -> None:
    num_labels, true, predicted = drawn
    names = tuple(name for name in CLASSES if num_labels == 2 or not METRICS[name].binary_only)
    computed = task_metrics(text_task(names, num_labels), predicted, true)
    assert computed == {name: expected(CLASSES[name], true, predicted) for name in names}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([-2.0, 0.0, 0.1, 1.0, 3.25])] * 2), min_size=2, max_size=6))
def test_score_metrics_are_those_of_scipy(pairs: list[tuple[float, float]]) -> None:
    true, predicted = map(list, zip(*pairs, strict=True))
    computed = task_metrics(text_task(tuple(SCORES), 1), predicted, true, undefined=math.nan)
    for name, function in SCORES.items():
        np.testing.assert_array_equal(computed[name], expected(function, true, predicted), err_msg=name)


def test_every_metric_is_compared_above() -> None:
    assert {*CLASSES, *SCORES} == set(METRICS)


@pytest.mark.parametrize(
    ("true", "predicted"),
    [
        ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]),  # constant predictions
        ([2.0, 2.0, 2.0], [1.0, 2.0, 3.0]),  # constant references
        ([1.0], [1.0]),  # one row
    ],
)
def test_an_undefined_correlation_is_zero_or_what_was_asked_for(true: list[float], predicted: list[float]) -> None:
    stsb = get_task("stsb")
    assert task_metrics(stsb, predicted, true) == {"pearson": 0.0, "spearmanr": 0.0}
    assert all(math.isnan(value) for value in task_metrics(stsb, predicted, true, undefined=math.nan).values())
    assert task_metrics(text_task(("mse",), 1), predicted, true)["mse"] == expected(SCORES["mse"], true, predicted)


@pytest.mark.parametrize("name", [*TASKS, "ax"])
def test_every_task_has_its_official_metrics(name: str) -> None:
    task = get_task(name)
    rng = np.random.default_rng(3)
    references = rng.uniform(0, 5, 30) if task.is_regression else rng.integers(0, task.num_labels, 30)
    logits = rng.normal(size=(30, task.num_labels)).astype(np.float32)
    predicted = logits[:, 0] if task.is_regression else logits.argmax(axis=1)
    own = make_compute_metrics(task)(EvalPrediction(predictions=(logits, None), label_ids=references))
    assert tuple(own) == task.metrics
    functions = CLASSES | SCORES
    for metric, value in own.items():
        assert value == pytest.approx(expected(functions[metric], references, predicted), abs=1e-6)
    loaded = evaluate.load(str(module.__file__), name)
    assert loaded.compute(predictions=predicted, references=references) == pytest.approx(own, abs=1e-6)


BAD_INPUT: list[tuple[str, list[float], list[float], str]] = [
    ("stsb", [], [], r"shapes \(0,\) and \(0,\).*at least one row"),
    ("cola", [], [], r"shapes \(0,\) and \(0,\).*at least one row"),
    ("cola", [1, 0], [1], r"shapes \(2,\) and \(1,\)"),
    ("stsb", [1.0, math.nan], [1.0, 2.0], "predictions, references: expected finite numbers"),
    ("stsb", [1.0, 2.0], [1.0, math.inf], "predictions, references: expected finite numbers"),
]


@pytest.mark.parametrize(("task", "predictions", "references", "message"), BAD_INPUT)
def test_bad_input_is_told(task: str, predictions: list[float], references: list[float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        task_metrics(get_task(task), predictions, references)


@pytest.mark.parametrize(
    ("names", "num_labels", "message"),
    [
        (["acuracy"], 2, "metrics='acuracy': expected, for 2 classes, some of accuracy, balanced_accuracy, f1, "),
        (["f1"], 3, "metrics='f1': expected, for 3 classes, some of accuracy, balanced_accuracy, f1_macro"),
        (["accuracy"], 1, "metrics='accuracy': expected, for a score, some of pearson, spearmanr, mse, mae"),
        (["pearson"], 2, "metrics='pearson'"),
        ([], 2, "metrics=''"),
    ],
)
def test_metrics_that_do_not_fit_are_told(names: list[str], num_labels: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        check_metrics(names, num_labels)


def test_the_default_metrics_fit() -> None:
    for num_labels in (1, 2, 3, 50):
        check_metrics(default_metrics(num_labels), num_labels)


# Invented scores, and their average by hand: 100 * 3.9625 / 9
RESULTS: dict[str, dict[str, float]] = {
    "cola": {"matthews_correlation": 0.5},
    "sst2": {"accuracy": 0.9},
    "mrpc": {"f1": 0.9, "accuracy": 0.8},
    "stsb": {"pearson": 0.8, "spearmanr": 0.6},
    "qqp": {"f1": 0.25, "accuracy": 0.5},
    "mnli": {"accuracy": 0.75, "mm_accuracy": 0.25},
    "qnli": {"accuracy": 0.1},
    "rte": {"accuracy": 0.2},
    "wnli": {"accuracy": 0.3},
}


def test_the_glue_average_counts_tasks_alike() -> None:
    by_hand = (0.5 + 0.9 + 0.85 + 0.7 + 0.375 + 0.5 + 0.1 + 0.2 + 0.3) / 9
    assert glue_average(RESULTS) == pytest.approx(by_hand)
    assert glue_average({**RESULTS, "ax": {"matthews_correlation": -1.0}}) == pytest.approx(by_hand)
    of_trainer = {
        name: {"eval_loss": 9.0, **{f"eval_{metric}": value for metric, value in metrics.items()}}
        for name, metrics in RESULTS.items()
    }
    assert glue_average(of_trainer) == pytest.approx(by_hand)


def test_the_glue_average_of_some_tasks_must_be_wanted() -> None:
    some = {name: RESULTS[name] for name in ("MRPC", "SST-2") for name in [get_task(name).name]}
    with pytest.raises(UsageError, match=r"results: no cola, stsb, qqp, .*partial=True"):
        glue_average(some)
    assert glue_average(some, partial=True) == pytest.approx((0.9 + 0.85) / 2)
    with pytest.raises(UsageError, match="results: no cola"):
        glue_average({DIAGNOSTIC.name: {"matthews_correlation": 1.0}}, partial=True)
    with pytest.raises(UsageError, match=r"results\['mnli'\]: no mm_accuracy \(found: accuracy\)"):
        glue_average({**RESULTS, "mnli": {"accuracy": 1.0}})
