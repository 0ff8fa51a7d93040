"""summary.png: the numbers of a run at a glance."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from trainer.data.shards import write_atomic

NUMBERS = FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:.3g}")  # 60, not 6 x 10^1
ANNOTATED_TASKS = 12  # more than this and a heat map's cells are too small for numbers
CURVES = (
    ("fd", "FD, classes seen", "C0"),
    ("kld", "KLD (nats)", "C1"),
    ("accuracy", "accuracy", "C2"),
)


def save_summary(path: Path, result: Mapping[str, Any]) -> None:
    """Heat maps (task by after-task) of FD and of accuracy, or of the class share where no class is asked for;
    curves of FD, KLD and accuracy over the tasks; forgetting of each task. Written atomically as PNG.

    Args:
        result: as `trainer.evaluation.forgetting.result` makes it.
    """
    figure = Figure(figsize=(13, 7.2), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3)
    seed = f", seed {result['seed']}" if "seed" in result else ""
    figure.suptitle(f"{result['method']}{seed}", fontweight="bold")
    conditional = result["final"]["accuracy"] is not None
    _heat_map(axes[0, 0], result["matrix"]["fd"], "FD of each task (lower is better)", reverse=True)
    if conditional:
        _heat_map(axes[0, 1], result["matrix"]["accuracy"], "accuracy of each task", percent=True)
    else:
        _heat_map(axes[0, 1], result["matrix"]["share"], "share of samples in each task's classes", percent=True)
    _forgetting(axes[0, 2], result["final"]["forgetting_per_task"])
    for axis, (key, label, colour) in zip(axes[1], CURVES, strict=True):
        _curve(axis, [row[key] for row in result["after_task"]], label, colour)
    data = io.BytesIO()
    figure.savefig(data, format="png")
    write_atomic(path, data.getvalue())


def _heat_map(
    axis: Axes, matrix: list[list[float | None]], title: str, *, reverse: bool = False, percent: bool = False
) -> None:
    """Rows: after task i; columns: task j. `reverse`: low values are the good, light ones, on a log scale."""
    values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=np.float64)
    size = len(values)
    known = values[np.isfinite(values)]
    low = max(float(known.min()), 1e-3) if known.size else 1.0
    if reverse:
        norm = LogNorm(low, max(float(known.max()), 1.5 * low) if known.size else 10.0)
        image = axis.imshow(np.maximum(values, low), cmap="YlOrRd", norm=norm)
    else:
        image = axis.imshow(values, cmap="YlGn", vmin=0.0, vmax=1.0 if percent else None)
    axis.set(title=title, xlabel="task", ylabel="after task")
    ticks = list(range(size)) if size <= ANNOTATED_TASKS else list(range(0, size, 5))
    axis.set_xticks(ticks, [str(tick + 1) for tick in ticks])
    axis.set_yticks(ticks, [str(tick + 1) for tick in ticks])
    if size <= ANNOTATED_TASKS:
        for (i, j), value in np.ndenumerate(values):
            if j > i:
                continue
            text = "--" if np.isnan(value) else f"{100 * value:.0f}" if percent else f"{value:.0f}"
            shade = 0.0 if np.isnan(value) else float(np.asarray(image.norm(value)))
            axis.text(j, i, text, ha="center", va="center", fontsize=9, color="white" if shade > 0.65 else "black")
    bar = axis.figure.colorbar(image, ax=axis, shrink=0.85)
    if reverse:
        few = float(known.max()) < 300 * low if known.size else True
        bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        bar.ax.yaxis.set_minor_locator(NullLocator())
        bar.ax.yaxis.set_major_formatter(NUMBERS)


def _forgetting(axis: Axes, values: list[float | None]) -> None:
    tasks = np.arange(1, len(values) + 1)
    known = [0.0 if value is None else value for value in values]
    axis.bar(tasks, known, color="C3", width=0.6)
    axis.axhline(0, color="0.3", linewidth=0.8)
    for task, value in zip(tasks, values, strict=True):
        if value is None:
            axis.text(float(task), 0, "lost", ha="center", va="bottom")
    axis.set(title="FD forgetting (end minus best before)", xlabel="task")
    axis.set_ylim(bottom=min(0.0, *known, 0.0) * 1.05)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not values:
        axis.text(0.5, 0.5, "one task: nothing to forget", ha="center", transform=axis.transAxes)


def _curve(axis: Axes, values: list[float | None], label: str, colour: str) -> None:
    tasks = np.arange(1, len(values) + 1)
    points = np.array([np.nan if value is None else value for value in values], dtype=np.float64)
    axis.plot(tasks, points, marker="o", color=colour)
    axis.set(title=label, xlabel="after task", xlim=(0.7, len(values) + 0.3))
    axis.set_ylim(bottom=0.0, top=1.02 if label == "accuracy" else None)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    if not np.isfinite(points).any():
        axis.text(0.5, 0.5, "no class is asked for", ha="center", transform=axis.transAxes)
