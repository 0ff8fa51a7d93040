"""What a comparison found: a table for people, compare.json for programs, compare.md and compare.png for documents."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from trainer.compare import Comparison, Run
from trainer.data.shards import write_atomic

PACKAGES = ("torch", "deepspeed", "diffusers", "numpy")


@dataclass(frozen=True)
class Column:
    """One measure of a finished run; None where the run has no such number."""

    key: str
    title: str
    read: Callable[[dict[str, Any]], float | None]


@dataclass(frozen=True)
class Statistics:
    """Over seeds; `sd` is the sample standard deviation, None with one seed."""

    count: int
    median: float
    low: float
    high: float
    mean: float
    sd: float | None


def _final(key: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda result: _number(result["final"].get(key))


def _seconds(result: dict[str, Any]) -> float | None:
    return _number(result["cost"].get("train_seconds"))


def _evaluations(result: dict[str, Any]) -> float | None:
    """Teacher evaluations per replay point used, the sampler's and the labels'; 0 without replay."""
    evaluations = _number(result["cost"].get("teacher_evaluations"))
    points = _number(result["cost"].get("replay_points_used"))
    if not evaluations or not points:
        return evaluations if evaluations == 0 else None
    return evaluations / points


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


COLUMNS = (
    Column("fd", "FD", _final("fd")),
    Column("kld", "KLD", _final("kld")),
    Column("accuracy", "accuracy", _final("accuracy")),
    Column("forgetting", "forgetting", _final("forgetting")),
    Column("seconds", "seconds", _seconds),
    Column("evaluations", "teacher evaluations / point", _evaluations),
)


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


def summarise(comparison: Comparison, runs: Sequence[Run]) -> dict[str, dict[str, Statistics]]:
    """By row and column; rows without a finished run are empty."""
    summary: dict[str, dict[str, Statistics]] = {}
    for row in comparison.rows:
        results = [run.result for run in runs if run.row == row.name and run.result is not None]
        values = {column.key: [column.read(result) for result in results] for column in COLUMNS}
        known = {key: [value for value in found if value is not None] for key, found in values.items()}
        summary[row.name] = {key: statistics_of(found) for key, found in known.items() if found}
    return summary


def cells(comparison: Comparison, runs: Sequence[Run]) -> list[list[str]]:
    """The table as text, header first."""
    summary = summarise(comparison, runs)
    lines = [["", "seeds", *(column.title for column in COLUMNS)]]
    for row in comparison.rows:
        mine = [run for run in runs if run.row == row.name]
        finished = sum(run.result is not None for run in mine)
        seeds = str(finished) if finished == len(mine) else f"{finished} of {len(mine)}"
        values = [summary[row.name].get(column.key) for column in COLUMNS]
        lines.append([row.name, seeds, *(_cell(value, comparison.mean) for value in values)])
    return lines


def _cell(value: Statistics | None, mean: bool) -> str:
    if value is None:
        return "-"
    if mean:
        return _digits(value.mean) + (f" ± {_digits(value.sd)}" if value.sd is not None else "")
    spread = f" ({_digits(value.low)}..{_digits(value.high)})" if value.count > 1 else ""
    return _digits(value.median) + spread


def _digits(value: float) -> str:
    size = abs(value)
    return f"{value:.0f}" if size >= 100 or value == 0 else f"{value:.1f}" if size >= 10 else f"{value:.3f}"


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know: failed runs, and features that make the FD of runs incomparable."""
    found = [f"{run.name} failed: {run.error} (log: {run.log})" for run in runs if run.result is None]
    evaluators = {str(run.result.get("evaluator")) for run in runs if run.result is not None}
    if len(evaluators) > 1:
        found.append(f"FD, KLD and accuracy are not comparable: {len(evaluators)} different evaluators measured them")
    return found


def rich_table(comparison: Comparison, runs: Sequence[Run]) -> Table:
    """Medians (or means) with their spread below them, a row per method or variant."""
    header, *lines = cells(comparison, runs)
    spread = "mean ± sd" if comparison.mean else "median (min..max)"
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        title=f"{comparison.config}: {spread} over seeds {', '.join(map(str, comparison.seeds))}",
    )
    for number, title in enumerate(header):
        short = title.replace("teacher evaluations / point", "teacher\nevals/point")
        table.add_column(short, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*(cell.replace(" (", "\n(") for cell in line))
    return table


def write_report(comparison: Comparison, runs: Sequence[Run]) -> list[Path]:
    """Write compare.json, compare.md and, where a run is finished, compare.png; returns their paths."""
    out = comparison.out
    paths = [out / "compare.json", out / "compare.md"]
    machine = describe_machine()
    write_atomic(paths[0], (json.dumps(_as_json(comparison, runs, machine), indent=1) + "\n").encode())
    write_atomic(paths[1], _markdown(comparison, runs, machine).encode())
    if any(run.result is not None for run in runs):
        paths.append(out / "compare.png")
        plot(comparison, runs, paths[-1])
    return paths


def describe_machine() -> dict[str, Any]:
    """Hardware and versions, for the numbers' sake."""
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    versions = {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return {"cores": os.cpu_count(), "machine": platform.machine(), "gpus": devices, "versions": versions}


def _as_json(comparison: Comparison, runs: Sequence[Run], machine: dict[str, Any]) -> dict[str, Any]:
    summary = summarise(comparison, runs)
    rows = []
    for row in comparison.rows:
        mine = [
            {"seed": run.seed, "directory": str(run.directory.root), "error": run.error, "result": run.result}
            for run in runs
            if run.row == row.name
        ]
        columns = {key: asdict(value) for key, value in summary[row.name].items()}
        rows.append({"name": row.name, "overrides": list(row.overrides), "summary": columns, "runs": mine})
    return {
        "command": comparison.command,
        "config": comparison.config,
        "overrides": list(comparison.overrides),
        "seeds": list(comparison.seeds),
        "num_gpus": comparison.num_gpus,
        "jobs": comparison.jobs,
        "rows": rows,
        **machine,
    }


def _markdown(comparison: Comparison, runs: Sequence[Run], machine: dict[str, Any]) -> str:
    header, *lines = cells(comparison, runs)
    spread = "Mean ± standard deviation" if comparison.mean else "Median (min..max)"
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    text = [f"    {comparison.command}", ""]
    text += [
        f"{spread} over seeds {', '.join(map(str, comparison.seeds))}; {machine['cores']} cores, {gpus}; {versions}.",
        "",
    ]
    text += [_markdown_line(header), _markdown_line(["---"] + ["---:"] * (len(header) - 1))]
    text += [_markdown_line(line) for line in lines]
    notes = [f"- {remark}" for remark in remarks(runs)]
    return "\n".join(text + (["", *notes] if notes else [])) + "\n"


def _markdown_line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"


# --- the plot ---------------------------------------------------------------------------------------------------


def plot(comparison: Comparison, runs: Sequence[Run], path: Path) -> None:
    """Final FD and KLD (a point per seed, a bar at the median), and FD after each task (median, thin lines by seed)."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _plot_final(left, comparison, runs, COLUMNS[0])
    _plot_final(middle, comparison, runs, COLUMNS[1])
    _plot_curves(right, comparison, runs)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_final(axes: Axes, comparison: Comparison, runs: Sequence[Run], column: Column) -> None:
    for place, row in enumerate(comparison.rows):
        results = [run.result for run in runs if run.row == row.name and run.result is not None]
        values = [value for value in map(column.read, results) if value is not None]
        if values:
            axes.plot([place] * len(values), values, "o", color=f"C{place}", alpha=0.7)
            axes.plot([place - 0.25, place + 0.25], [statistics.median(values)] * 2, color=f"C{place}", linewidth=2)
    axes.set_xticks(range(len(comparison.rows)), [row.name for row in comparison.rows], rotation=20, ha="right")
    axes.set_ylim(bottom=0)
    axes.set_title(f"final {column.title}")


def _plot_curves(axes: Axes, comparison: Comparison, runs: Sequence[Run]) -> None:
    for place, row in enumerate(comparison.rows):
        curves = [fd_curve(run.result) for run in runs if run.row == row.name and run.result is not None]
        for curve in curves:
            axes.plot(range(1, len(curve) + 1), curve, color=f"C{place}", alpha=0.3, linewidth=1)
        if curves:
            middle = [statistics.median(values) for values in zip(*curves, strict=True)]
            axes.plot(range(1, len(middle) + 1), middle, "o-", color=f"C{place}", label=row.name)
            axes.set_xticks(range(1, len(middle) + 1))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("task")
    axes.set_title("FD on all classes seen, after each task")
    axes.legend()


def fd_curve(result: dict[str, Any]) -> list[float]:
    """FD after each task, NaN where it was not measured."""
    values = [_number(row.get("fd")) for row in result["after_task"]]
    return [float("nan") if value is None else value for value in values]
