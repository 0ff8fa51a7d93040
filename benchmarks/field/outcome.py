"""From finished runs to numbers by row and seed, and from those to means and paired comparisons."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from quality.paired import Interval, paired_difference, paired_ratio
from quality.result import measure_all

from trainer.compare import Run

Numbers = Mapping[int, float]  # by seed


@dataclass(frozen=True)
class Outcome:
    """A finished run: `final` of its last model on many samples, `result` its metrics.json."""

    final: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def bpd(self) -> list[float]:
        """Bits per dimension of each task's test images, of the last model."""
        return list(self.result["matrix"]["bpd"][-1])

    @property
    def bpd_grown(self) -> float:
        """How much the bits per dimension of earlier tasks have grown since each was learnt, as a factor."""
        bpd = self.result["matrix"]["bpd"]
        return geometric_mean([bpd[-1][task] / bpd[task][task] for task in range(len(bpd) - 1)])

    @property
    def loss_grown(self) -> list[float]:
        """How much the loss of earlier tasks has grown since each was learnt, as a factor by bin of timesteps."""
        bins = self.result["matrix"]["loss_bins"]
        tasks = range(len(bins) - 1)
        return [
            geometric_mean([bins[-1][task][k] / bins[task][task][k] for task in tasks]) for k in range(len(bins[-1][0]))
        ]

    @property
    def loss_forgotten(self) -> list[float]:
        """By how much it has grown, by bin."""
        by_task = self.result["final"]["forgetting_loss_bins"]
        return [statistics.fmean(values) for values in zip(*by_task, strict=True)]

    @property
    def memorised(self) -> float:
        """Share of samples that are nearer to an image of the buffer than any other training image is to that one."""
        return float(self.final["nearest"]["buffer"]["features"]["memorised"])


Outcomes = Mapping[str, Mapping[int, Outcome]]  # by row and seed


def collect(runs: Sequence[Run], samples: int, jobs: int) -> dict[str, dict[int, Outcome]]:
    """Of the finished runs; the final model of each is measured on `samples` images."""
    found: dict[str, dict[int, Outcome]] = {}
    for run, result, final in measure_all(runs, samples, jobs):
        found.setdefault(run.row, {})[run.seed] = Outcome(final, result)
    return found


def numbers(outcomes: Mapping[int, Outcome], read: Callable[[Outcome], float]) -> dict[int, float]:
    return {seed: read(outcome) for seed, outcome in sorted(outcomes.items())}


def final(key: str) -> Callable[[Outcome], float]:
    """A reader of a measure of the final model."""
    return lambda outcome: float(outcome.final[key])


def ratio(ours: Numbers, other: Numbers) -> Interval:
    """Over the seeds that both have."""
    return paired_ratio(*_shared(ours, other))


def difference(ours: Numbers, other: Numbers) -> Interval:
    """Over the seeds that both have."""
    return paired_difference(*_shared(ours, other))


def spread(values: Numbers) -> dict[str, Any]:
    """As it stands in a result file."""
    seen = list(values.values())
    sd = statistics.stdev(seen) if len(seen) > 1 else None
    return {"mean": statistics.fmean(seen), "min": min(seen), "max": max(seen), "sd": sd, "by_seed": dict(values)}


def _shared(ours: Numbers, other: Numbers) -> tuple[list[float], list[float]]:
    seeds = sorted(set(ours) & set(other))
    return [ours[seed] for seed in seeds], [other[seed] for seed in seeds]
