"""From finished runs to rows: means and spread over seeds, and the paired comparison with in-loop distillation."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quality.paired import Interval, paired_difference, paired_ratio
from quality.variants import DEFAULT, INLINE, Variant, variant
from trainer.compare import Run
from trainer.data.shards import write_atomic
from trainer.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
FD_BAR, KLD_BAR, FORWARDS_BAR = 1.05, 0.02, 2.0
KEPT = "measured.json"  # in a run's directory: its final model on many samples
MEASURES = ("fd", "kld")
Numbers = dict[str, float]  # fd, kld, teacher_forwards_per_point


def measure(run: Run, samples: int) -> dict[str, Any]:
    """The final model of a finished run on `samples` generated images; kept, and not made again.

    Raises:
        UserError: the measurement failed; its last line.
    """
    path = run.directory.root / KEPT
    if path.exists():
        row = json.loads(path.read_text())
        if row["samples"] >= samples:
            return row
    command = [sys.executable, str(ROOT / "launch" / "evaluate.py"), "--run", str(run.directory.root)]
    done = subprocess.run(
        [*command, f"evaluation.samples={samples}"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # these, too, go side by side
    )
    if done.returncode:
        raise UserError(f"{run.name}: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    write_atomic(path, done.stdout.encode())
    return json.loads(done.stdout)


def measure_all(runs: Sequence[Run], samples: int, jobs: int) -> list[tuple[Run, dict[str, Any], dict[str, Any]]]:
    """Each finished run with its metrics.json and the measures of its final model; `jobs` are measured at once."""
    finished = [(run, run.result) for run in runs if run.result is not None]
    with ThreadPoolExecutor(jobs) as pool:
        measured = list(pool.map(lambda run: measure(run, samples), [run for run, _ in finished]))
    return [(run, result, row) for (run, result), row in zip(finished, measured, strict=True)]


def collect(runs: Sequence[Run], samples: int, jobs: int) -> dict[str, dict[int, Numbers]]:
    """The numbers of each finished run, by variant and seed."""
    found: dict[str, dict[int, Numbers]] = {}
    for run, result, row in measure_all(runs, samples, jobs):
        forwards = result["cost"]["teacher_evaluations"] / result["cost"]["replay_points_used"]
        numbers = {"fd": row["fd"], "kld": row["kld"], "teacher_forwards_per_point": forwards}
        found.setdefault(run.row, {})[run.seed] = numbers
    return found


def rows_of(found: Mapping[str, Mapping[int, Numbers]]) -> list[dict[str, Any]]:
    """A row for each variant, each with what its seeds say that it shares with in-loop distillation."""
    return [_row(variant(name), found) for name in found]


def _row(chosen: Variant, found: Mapping[str, Mapping[int, Numbers]]) -> dict[str, Any]:
    mine, inline, default = found[chosen.name], found.get(INLINE, {}), found.get(DEFAULT, {})
    seeds = sorted(mine)
    row: dict[str, Any] = {"variant": chosen.name, "question": chosen.question, "settings": list(chosen.settings)}
    row |= {
        key: statistics.fmean(mine[seed][key] for seed in seeds) for key in (*MEASURES, "teacher_forwards_per_point")
    }
    row["seeds"] = seeds
    row["by_seed"] = {key: [mine[seed][key] for seed in seeds] for key in MEASURES}
    row["spread"] = {key: _spread(row["by_seed"][key]) for key in MEASURES}
    shared = [seed for seed in seeds if seed in inline]
    if shared and chosen.name != INLINE:
        fd, kld = ([[of[seed][key] for seed in shared] for of in (mine, inline)] for key in MEASURES)
        row["paired_seeds"] = len(shared)
        row["fd_ratio"] = asdict(paired_ratio(*fd))
        row["kld_difference"] = asdict(paired_difference(*kld))
        row["verdict"] = _verdict(row)
    both = [seed for seed in seeds if seed in default]
    if both and chosen.name not in (INLINE, DEFAULT):
        row["fd_over_default"] = asdict(paired_ratio(*([of[seed]["fd"] for seed in both] for of in (mine, default))))
    return row


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"min": min(values), "median": statistics.median(values), "max": max(values), "sd": sd}


def _verdict(row: Mapping[str, Any]) -> dict[str, str]:
    """Of the bars: `reached` where the whole interval lies within, `missed` where it lies outside, else `open`."""
    forwards = row["teacher_forwards_per_point"]
    return {
        "fd": _judge(Interval(**row["fd_ratio"]), FD_BAR),
        "kld": _judge(Interval(**row["kld_difference"]), KLD_BAR),
        "teacher_forwards_per_point": "reached" if forwards <= FORWARDS_BAR else "missed",
    }


def _judge(found: Interval, bar: float) -> str:
    if found.low is None or found.high is None:
        return "open"
    return "reached" if found.high <= bar else "missed" if found.low > bar else "open"
