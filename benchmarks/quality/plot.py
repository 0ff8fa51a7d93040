"""Quality against what it costs the teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quality.variants import DEFAULT, INLINE

TICKS = (0.25, 0.5, 1, 2, 4, 8, 16)


def plot(rows: Sequence[Mapping[str, Any]], path: Path, data: str) -> None:
    """FD over that of in-loop distillation and KLD less its KLD, with their intervals, against teacher forwards."""
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    measures = (("fd_ratio", "FD / FD of in-loop distillation", 1.0), ("kld_difference", "KLD - KLD of in-loop", 0.0))
    for axes, (key, title, level) in zip(figure.subplots(1, 2), measures, strict=True):
        _plot_measure(axes, rows, key, level)
        axes.set_title(title)
    figure.suptitle(f"{data}: mean and 90 % interval over paired seeds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _plot_measure(axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, level: float) -> None:
    axes.axhline(level, color="grey", linewidth=1)
    shown = sorted(rows, key=lambda row: row["teacher_forwards_per_point"])
    for place, row in enumerate(shown):
        found, forwards = row.get(key), row["teacher_forwards_per_point"]
        if found is None and row["variant"] != INLINE:
            continue
        found = found or {"mean": level, "low": None, "high": None}
        color = {DEFAULT: "C3", INLINE: "black"}.get(row["variant"], "C0")
        if found["low"] is not None:
            axes.plot([forwards] * 2, [found["low"], found["high"]], color=color, alpha=0.5)
        axes.plot(forwards, found["mean"], "o", color=color)
        side = 1 if place % 2 else -1  # neighbours are named on different sides
        axes.annotate(
            row["variant"],
            (forwards, found["mean"]),
            textcoords="offset points",
            xytext=(6 * side, 4),
            ha="left" if side > 0 else "right",
            fontsize=8,
            color=color,
        )
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
    axes.set_xlim(TICKS[0], TICKS[-1])
    axes.set_xlabel("teacher forwards per replay point used")
