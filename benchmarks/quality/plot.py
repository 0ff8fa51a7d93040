"""Quality beside what it costs the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quality.variants import DEFAULT, INLINE

MEASURES = (
    ("fd_ratio", "FD / FD of in-loop distillation", 1.0),
    ("kld_difference", "KLD - KLD of in-loop distillation", 0.0),
)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, data: str) -> None:
    """FD over that of in-loop distillation and KLD less its KLD, with their intervals: a line for each variant, those
    that ask the teacher least on top."""
    shown = sorted(rows, key=lambda row: row["teacher_forwards_per_point"])
    figure = Figure(figsize=(12, 1.6 + 0.34 * len(shown)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, (key, title, level) in zip((left, right), MEASURES, strict=True):
        axes.axvline(level, color="grey", linewidth=1)
        for place, row in enumerate(shown):
            _plot_row(axes, row, key, level, place)
        axes.set_title(f"{title}: left is better")
        axes.grid(axis="x", alpha=0.3)
    names = [f"{row['variant']}   {row['teacher_forwards_per_point']:.2f}" for row in shown]
    left.set_yticks(range(len(shown)), names)
    left.set_ylim(len(shown) - 0.5, -0.5)
    left.set_ylabel("variant, teacher forwards / point")
    figure.suptitle(f"{data}: mean and 90 % interval over paired seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_row(axes: Axes, row: Mapping[str, Any], key: str, level: float, place: int) -> None:
    found = {"mean": level, "low": None, "high": None} if row["variant"] == INLINE else row.get(key)
    if found is None:  # no seed is shared with in-loop distillation
        return
    color = {DEFAULT: "C3", INLINE: "black"}.get(row["variant"], "C0")
    if found["low"] is not None:
        axes.plot([found["low"], found["high"]], [place] * 2, color=color, alpha=0.5, linewidth=2)
    axes.plot(found["mean"], place, "o", color=color)
