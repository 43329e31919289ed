"""What a suite measured of one method on one task, beside its baseline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..errors import UsageError
from ..glue.suite import Method, Summary, summarize
from ..glue.suite.arguments import settings_digest
from ..glue.tasks import GlueTask, get_task


@dataclass(frozen=True)
class Measured:
    """What the runs of a method on a task gave, beside those of a baseline on the same seeds.

    Attributes:
        task: The task.
        method: The method.
        baseline: What it is compared with; None for nothing.
        own: The suite's lines of the method, one a seed, split and metric.
        reference: Those of the baseline; empty without one.
        settings: What the runs were made with: the suite's shared settings and the task's own.
    """

    task: GlueTask
    method: Method
    baseline: Method | None
    own: pd.DataFrame
    reference: pd.DataFrame
    settings: Mapping[str, Any]

    @property
    def seeds(self) -> list[int]:
        """Of the method's runs."""
        return sorted(set(self.own["seed"]))

    def scores(self) -> dict[tuple[str, str], tuple[Summary, Summary | None]]:
        """Return the scores of method and baseline by split and metric, the official metrics in their order."""
        found = {}
        for split in self.task.validation_splits:
            for metric in self.task.metrics:
                own, reference = (_by_seed(lines, "score", split, metric) for lines in (self.own, self.reference))
                if own:
                    found[split, metric] = (summarize(own, reference), summarize(reference) if reference else None)
        return found

    def by_seed(self, column: str) -> tuple[dict[int, float], dict[int, float]]:
        """Return a column that is the same in all lines of a run, of method and baseline, by seed; empty if unknown."""
        return _by_seed(self.own, column), _by_seed(self.reference, column)

    def ratio(self, column: str) -> float:
        """Return the median over seeds of a column as a multiple of the baseline's; NaN where that is not known."""
        own, reference = self.by_seed(column)
        ratios = [value / reference[seed] for seed, value in own.items() if reference.get(seed)]
        return statistics.median(ratios) if ratios else math.nan


def _by_seed(lines: pd.DataFrame, column: str, split: str | None = None, metric: str | None = None) -> dict[int, float]:
    if column not in lines:
        return {}
    if split is not None:
        lines = lines[(lines["split"] == split) & (lines["metric"] == metric)]
    known = lines.dropna(subset=[column]).drop_duplicates("seed")
    return {int(seed): float(value) for seed, value in zip(known["seed"], known[column], strict=True)}


def measured(
    results: pd.DataFrame, settings: Mapping[str, Any], task: str, method: Method, baseline: Method | None = None
) -> Measured:
    """Find what a card is made of.

    Args:
        results: From :func:`~hf_lightsam.glue.suite.read_results`.
        settings: Of the suite's ``settings.json``.
        task: One of GLUE's tasks.
        method: The method.
        baseline: What to compare it with. None: nothing.

    Raises:
        UsageError: If there are no such runs, or they were not made with these settings, or on other rows than the
            baseline's.
    """
    known = get_task(task)
    of_task = results[results["task"] == known.name]
    if of_task.empty:
        there = ", ".join(sorted(set(results["task"]))) or "none"
        raise UsageError(f"task={task!r}: no runs of it; expected one of: {there}")

    def lines(one: Method, argument: str) -> pd.DataFrame:
        found = of_task[(of_task["method"] == one.name) & (of_task["options"] == one.options)]
        if found.empty:
            names = zip(of_task["method"], of_task["options"], strict=True)
            there = ", ".join(sorted({Method(*each).label for each in names})) or "none"
            raise UsageError(f"{argument}={one.label!r}: no runs of it on {known.name}; expected one of: {there}")
        return found

    own = lines(method, "method")
    reference = own.iloc[:0] if baseline is None else lines(baseline, "baseline")
    if known.name not in settings.get("tasks", {}):
        raise UsageError(f"settings: none for {known.name}; expected the settings.json beside the results")
    made = {*own["settings"], *reference["settings"]}
    if made != {settings_digest(dict(settings), known.name)}:
        raise UsageError(
            f"settings: the runs of {known.name} were made with others; expected the settings.json of them"
        )
    rows = dict(zip(own["seed"], own["data"], strict=True))
    for seed, data in zip(reference["seed"], reference["data"], strict=True):
        if rows.get(seed, data) != data:
            raise UsageError(
                f"results: {method.label} and the baseline had other rows of {known.name} with seed {seed}"
            )
    return Measured(known, method, baseline, own, reference, {**settings["shared"], **settings["tasks"][known.name]})
