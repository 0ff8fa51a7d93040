"""Several runs of one thing: their middle, and how far they lie apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.report.measures import Values


@dataclass(frozen=True)
class Statistics:
    """Over seeds; `sd` is the sample standard deviation, None with one seed."""

    count: int
    median: float
    low: float
    high: float
    mean: float
    sd: float | None


def statistics_of(values: Sequence[float]) -> Statistics:
    """Of at least one value."""
    return Statistics(
        count=len(values),
        median=statistics.median(values),
        low=min(values),
        high=max(values),
        mean=statistics.fmean(values),
        sd=statistics.stdev(values) if len(values) > 1 else None,
    )


def spread_text(value: Statistics | None, mean: bool) -> str:
    """Mean and standard deviation, or median and range."""
    if value is None:
        return "-"
    if mean:
        return short(value.mean) + (f" ± {short(value.sd)}" if value.sd is not None else "")
    spread = f" ({short(value.low)}..{short(value.high)})" if value.count > 1 else ""
    return short(value.median) + spread


def spread_name(mean: bool) -> str:
    return "mean ± sd" if mean else "median (min..max)"


def short(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 or value == 0 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def band(values: Values, mean: bool) -> tuple[Values, Values, Values]:
    """Middle, lower and upper edge over the first axis (seeds): mean and one standard deviation to each side, or median
    and range. What is not known of some seeds is left out; NaN where it is known of none."""
    flat = values.reshape(len(values), -1)
    found = np.full((3, flat.shape[1]), np.nan)
    for place in range(flat.shape[1]):
        known = flat[np.isfinite(flat[:, place]), place]
        if known.size:
            one = statistics_of(known.tolist())
            spread = one.sd or 0.0
            found[:, place] = (
                (one.mean, one.mean - spread, one.mean + spread) if mean else (one.median, one.low, one.high)
            )
    middle, low, high = found.reshape(3, *values.shape[1:])
    return middle, low, high
