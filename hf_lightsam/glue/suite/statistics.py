"""Scores over seeds: mean, spread, and the paired difference to a baseline with its interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.stats

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class Summary:
    """What the seeds of one method gave.

    Attributes:
        scores: By seed.
        differences: To the baseline's score of the same seed, where that is there; empty for the baseline itself.
    """

    scores: Mapping[int, float]
    differences: Mapping[int, float]

    @property
    def mean(self) -> float:
        """Of the scores."""
        return statistics.fmean(self.scores.values())

    @property
    def median(self) -> float:
        """Of the scores."""
        return statistics.median(self.scores.values())

    @property
    def deviation(self) -> float:
        """Standard deviation of the scores over seeds (``n - 1`` below); NaN for one seed."""
        return statistics.stdev(self.scores.values()) if len(self.scores) > 1 else math.nan

    @property
    def difference(self) -> float:
        """Mean of the differences; NaN without any."""
        return statistics.fmean(self.differences.values()) if self.differences else math.nan

    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the mean difference, by :func:`bootstrap_interval`."""
        return bootstrap_interval(list(self.differences.values()))


def summarize(scores: Mapping[int, float], baseline: Mapping[int, float] | None = None) -> Summary:
    """Summarize scores by seed.

    Args:
        scores: Of the method.
        baseline: Of the baseline, by the same seeds or others; only seeds of both are compared. None: no comparison.
    """
    paired = {seed: scores[seed] - baseline[seed] for seed in scores if seed in baseline} if baseline else {}
    return Summary(dict(scores), paired)


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of a mean: ``scipy.stats.bootstrap``, the same at every call.

    With n seeds there are only ``n**n`` resamples. Below four seeds the interval reaches from the smallest value to the
    largest; up to about ten it covers less than the 95 % that it is named after.

    Returns:
        Its ends. NaN for fewer than two values; the value itself where all are equal.
    """
    if len(values) < 2:
        return math.nan, math.nan
    if len(set(values)) == 1:
        return values[0], values[0]
    found = scipy.stats.bootstrap((values,), np.mean, confidence_level=LEVEL, method="percentile", rng=0)
    return float(found.confidence_interval.low), float(found.confidence_interval.high)
