"""What a comparison found: a table and a page for people, compare.json for programs, compare.md for documents."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table

from trainer.compare import Comparison, Run
from trainer.data.shards import write_atomic
from trainer.report.comparison import OWN_CLASSIFIER, Findings, write_comparison
from trainer.report.comparison_figures import Group, Member
from trainer.report.spread import Statistics, spread_name, spread_text, statistics_of
from trainer.settings import load_config

PACKAGES = ("torch", "deepspeed", "diffusers", "numpy")


@dataclass(frozen=True)
class Column:
    """One measure of a finished run; None where the run has no such number.

    `optional`: shown where some run has it.
    """

    key: str
    title: str
    read: Callable[[dict[str, Any]], float | None]
    optional: bool = False


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
    *(Column(key, title, _final(key), optional=True) for key, title in OWN_CLASSIFIER.items()),
    Column("seconds", "seconds", _seconds),
    Column("evaluations", "teacher evaluations / point", _evaluations),
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


def _shown(summary: dict[str, dict[str, Statistics]]) -> list[Column]:
    return [column for column in COLUMNS if not column.optional or any(column.key in row for row in summary.values())]


def cells(comparison: Comparison, runs: Sequence[Run], columns: Sequence[Column] = ()) -> list[list[str]]:
    """The table as text, header first; of all columns that there are, unless some are named."""
    summary = summarise(comparison, runs)
    columns = columns or _shown(summary)
    lines = [["", "seeds", *(column.title for column in columns)]]
    for row in comparison.rows:
        mine = [run for run in runs if run.row == row.name]
        finished = sum(run.result is not None for run in mine)
        seeds = str(finished) if finished == len(mine) else f"{finished} of {len(mine)}"
        values = [summary[row.name].get(column.key) for column in columns]
        lines.append([row.name, seeds, *(spread_text(value, comparison.mean) for value in values)])
    return lines


def remarks(runs: Sequence[Run]) -> list[str]:
    """What a reader of the table must know: failed runs, and features that make the FD of runs incomparable."""
    found = [f"{run.name} failed: {run.error} (log: {run.log})" for run in runs if run.result is None]
    evaluators = {str(run.result.get("evaluator")) for run in runs if run.result is not None}
    if len(evaluators) > 1:
        found.append(f"FD, KLD and accuracy are not comparable: {len(evaluators)} different evaluators measured them")
    return found


def rich_tables(comparison: Comparison, runs: Sequence[Run]) -> list[Table]:
    """Medians (or means) with their spread below them, a row per method or variant.

    What only models with a classifier have stands in a table of its own: a terminal has no room for more columns.
    """
    columns = _shown(summarise(comparison, runs))
    title = f"{comparison.config}: {spread_name(comparison.mean)} over seeds {', '.join(map(str, comparison.seeds))}"
    parts = [
        (title, [column for column in columns if not column.optional]),
        ("the models' own classifiers", [column for column in columns if column.optional]),
    ]
    return [_rich(name, cells(comparison, runs, chosen)) for name, chosen in parts if chosen]


def _rich(title: str, lines: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title)
    for number, name in enumerate(lines[0]):
        short = name.replace("teacher evaluations / point", "teacher\nevals/point")
        table.add_column(short, justify="left" if number == 0 else "right", no_wrap=True)
    for line in lines[1:]:
        table.add_row(*(cell.replace(" (", "\n(") for cell in line))
    return table


def write_report(comparison: Comparison, runs: Sequence[Run]) -> list[Path]:
    """Write compare.json, compare.md, the page over all runs and, where a run is finished, compare.png; returns their
    paths."""
    out = comparison.out
    paths = [out / "compare.json", out / "compare.md"]
    machine = describe_machine()
    write_atomic(paths[0], (json.dumps(_as_json(comparison, runs, machine), indent=1) + "\n").encode())
    write_atomic(paths[1], _markdown(comparison, runs, machine).encode())
    return paths + write_comparison(_findings(comparison, runs, machine), out)


def _findings(comparison: Comparison, runs: Sequence[Run], machine: dict[str, Any]) -> Findings:
    """What the page tells."""
    groups = [
        Group(
            row.name,
            tuple(Member(run.seed, run.directory.root, run.result, run.error) for run in runs if run.row == row.name),
        )
        for row in comparison.rows
    ]
    config = load_config(comparison.config, list(comparison.overrides))
    return Findings(
        title=f"Comparison: {comparison.config}",
        cells=cells(comparison, runs),
        remarks=remarks(runs),
        facts=[comparison.command, f"seeds {', '.join(map(str, comparison.seeds))}; {_hardware(machine)}"],
        groups=groups,
        timesteps=config.diffusion.timesteps,
        task_classes=config.data.tasks,
        mean=comparison.mean,
    )


def _hardware(machine: dict[str, Any]) -> str:
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return f"{machine['cores']} cores, {gpus}; {versions}"


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
    text = [f"    {comparison.command}", ""]
    text += [
        f"{spread} over seeds {', '.join(map(str, comparison.seeds))}; {_hardware(machine)}.",
        "",
    ]
    text += [_markdown_line(header), _markdown_line(["---"] + ["---:"] * (len(header) - 1))]
    text += [_markdown_line(line) for line in lines]
    notes = [f"- {remark}" for remark in remarks(runs)]
    return "\n".join(text + (["", *notes] if notes else [])) + "\n"


def _markdown_line(parts: Sequence[str]) -> str:
    return f"| {' | '.join(parts)} |"
