"""The tables of a suite: scores over seeds against the baseline, the GLUE average, and costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

import pandas as pd

from ..metrics import glue_average
from ..tasks import TASKS
from .methods import Method
from .statistics import Summary, summarize

Scores = dict[str, dict[int, float]]
"""By the method's label and the seed."""

AVERAGE = "GLUE average"


def labelled(results: pd.DataFrame) -> pd.DataFrame:
    """Return results with a column ``label``, the methods' names with their options."""
    labels = [Method(name, options).label for name, options in zip(results["method"], results["options"], strict=True)]
    return results.assign(label=labels)


def scores_by_metric(results: pd.DataFrame) -> dict[tuple[str, str, str], Scores]:
    """Return scores by task, split and metric, tasks and metrics in GLUE's order."""
    lines = labelled(results)
    found: dict[tuple[str, str, str], Scores] = {}
    for name, task in TASKS.items():
        for split in task.validation_splits:
            for metric in task.metrics:
                own = lines[(lines["task"] == name) & (lines["split"] == split) & (lines["metric"] == metric)]
                if len(own):
                    found[name, split, metric] = by_seed(own, "score")
    return found


def glue_averages(results: pd.DataFrame) -> Scores:
    """Return the GLUE average of each method and seed that has all nine tasks."""
    scores: Scores = {}
    for (label, seed), lines in labelled(results).groupby(["label", "seed"]):
        if set(lines["task"]) == set(TASKS):
            by_task: dict[str, dict[str, float]] = {}
            for line in lines.itertuples():
                prefix = "mm_" if line.split.endswith("mismatched") else ""
                by_task.setdefault(line.task, {})[f"{prefix}{line.metric}"] = line.score
            scores.setdefault(label, {})[int(seed)] = glue_average(by_task)
    return scores


def by_seed(lines: pd.DataFrame, column: str) -> Scores:
    """Return a column of labelled lines that have one line a method and seed."""
    scores: Scores = {}
    for label, seed, value in zip(lines["label"], lines["seed"], lines[column], strict=True):
        scores.setdefault(label, {})[int(seed)] = float(value)
    return scores


def score_table(results: pd.DataFrame, baseline: Method | None) -> str:
    """Return the Markdown table of all scores; it holds nothing that differs when the same runs are made again.

    Args:
        results: From :func:`~hf_lightsam.glue.suite.read_results`.
        baseline: What the others are compared with on the same seeds. None: no comparison.
    """
    header = ["task", "metric", "method", "seeds", "mean", "sd", "median"]
    header += [f"difference to {baseline.label} [95 %]"] if baseline else []
    lines = []
    groups = {
        (_split_name(task, split), metric): each for (task, split, metric), each in scores_by_metric(results).items()
    }
    averages = glue_averages(results)
    for (name, metric), scores in {**groups, **({(AVERAGE, ""): averages} if averages else {})}.items():
        for label, summary in summaries(scores, baseline).items():
            cells = [name, metric, label, str(len(summary.scores))]
            cells += [number(value, 4) for value in (summary.mean, summary.deviation, summary.median)]
            lines.append(cells + ([difference(summary)] if baseline else []))
    return markdown(header, lines, numbers_from=3)


def summaries(scores: Scores, baseline: Method | None) -> dict[str, Summary]:
    """Summarize each method's scores, the baseline's first, the others in order of their names."""
    reference = scores.get(baseline.label) if baseline else None
    labels = sorted(scores, key=lambda label: (baseline is None or label != baseline.label, label))
    return {
        label: summarize(scores[label], reference if baseline and label != baseline.label else None) for label in labels
    }


def cost_table(results: pd.DataFrame, baseline: Method | None) -> str:
    """Return the Markdown table of costs: medians over seeds, as multiples of the baseline's where there is one.

    Time is that of a step; memory the peak (of the accelerator, or of the process); state the optimizer's over the
    weights, which is no multiple.
    """
    columns = {"row_gradients": "gradients", "step_seconds": "time", "peak_memory": "memory"}
    lines = labelled(results).drop_duplicates(["task", "label", "seed"])
    cells = []
    for name in [name for name in TASKS if name in set(lines["task"])]:
        own = lines[lines["task"] == name]
        by_column = {column: by_seed(own, column) for column in (*columns, "state_over_weights")}
        for label in summaries(by_column["row_gradients"], baseline):
            values = [cost_ratio(by_column[column], label, baseline) for column in columns]
            seconds = statistics.median(by_column["step_seconds"][label].values())
            state = statistics.median(by_column["state_over_weights"][label].values())
            cells.append([name, label, *(number(value, 2) for value in (*values, state)), number(seconds, 4)])
    header = ["task", "method", *columns.values(), "optimizer state / weights", "seconds a step"]
    return markdown(header, cells, numbers_from=2)


def cost_ratio(values: Scores, label: str, baseline: Method | None) -> float:
    """Return a cost as a multiple of the baseline's on the same seed, the median over seeds; NaN without any."""
    reference = values.get(baseline.label, {}) if baseline else {}
    ratios = [value / reference[seed] for seed, value in values[label].items() if reference.get(seed)]
    return statistics.median(ratios) if ratios else math.nan


def tables(results: pd.DataFrame, baseline: Method | None) -> str:
    """Return both tables."""
    costs = f"Costs, as multiples of {baseline.label}'s:" if baseline else "Costs:"
    return f"{score_table(results, baseline)}\n\n{costs}\n\n{cost_table(results, baseline)}"


def difference(summary: Summary, digits: int = 4) -> str:
    """Return the mean difference with its interval, or ``-``."""
    if not summary.differences:
        return "-"
    told = f"{summary.difference:+.{digits}f}"
    if len(summary.differences) < 2:
        return told
    return told + " [{:+.{digits}f}, {:+.{digits}f}]".format(*summary.interval(), digits=digits)


def number(value: float, digits: int) -> str:
    """Return a number with so many decimals, ``-`` for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], numbers_from: int) -> str:
    """Return a Markdown table, its columns from ``numbers_from`` on set to the right."""
    marks = "|---" * numbers_from + "|---:" * (len(header) - numbers_from) + "|"
    rows = ["| " + " | ".join(cells) + " |" for cells in (header, *lines)]
    return "\n".join([rows[0], marks, *rows[1:]])


def _split_name(task: str, split: str) -> str:
    _, separator, which = split.partition("_")
    return f"{task} {which}" if separator else task
