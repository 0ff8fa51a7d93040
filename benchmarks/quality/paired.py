"""Statistics of runs that share a seed: their first task, their real batches and all their noise are the same."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.9


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval by Student's t; one value has none."""

    mean: float
    low: float | None = None
    high: float | None = None

    def map(self, function: Callable[[float], float]) -> Interval:
        """The interval of an increasing function of the quantity."""
        low, high = (None if end is None else function(end) for end in (self.low, self.high))
        return Interval(function(self.mean), low, high)


def interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Of the mean of at least one value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return Interval(mean)
    error = statistics.stdev(values) / math.sqrt(len(values))
    width = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1)) * error
    return Interval(mean, mean - width, mean + width)


def paired_difference(ours: Sequence[float], reference: Sequence[float]) -> Interval:
    """Of ours - reference, seed by seed."""
    return interval([mine - other for mine, other in zip(ours, reference, strict=True)])


def paired_ratio(ours: Sequence[float], reference: Sequence[float]) -> Interval:
    """Of ours / reference, seed by seed: the geometric mean and its interval, for positive values."""
    logs = paired_difference([math.log(value) for value in ours], [math.log(value) for value in reference])
    return logs.map(math.exp)
