"""Figures of what was logged while a run learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from trainer.report.drawing import COLOURS, Drawn, new_figure, plain_log, tidy
from trainer.report.measures import Values, as_array

PANELS = (  # name, title, keys with what they are called, log scale
    ("training-loss", "loss", (("loss", "all"), ("current", "current task"), ("replay", "replay")), True),
    ("training-classification", "cross-entropy", (("classification", "labels"), ("logits", "teachers' logits")), True),
    ("training-penalty", "value of the penalty", (("penalty", "penalty"),), False),
    ("training-gradient", "norm of the gradient, before clipping", (("grad_norm", "gradient"),), True),
    ("training-speed", "images per second", (("images_per_second", "images"),), False),
    (
        "training-waits",
        "share of the time spent waiting",
        (("replay_wait_share", "for replay"), ("data_wait_share", "for images")),
        False,
    ),
)
POINTS = 1500  # of a line; more lie on each other
Lines = Sequence[Mapping[str, Any]]


def training_figures(log: Lines, images_per_task: int) -> list[Drawn]:
    """Curves over seen images, with the tasks' ends; what was not logged has no figure.

    Args:
        log: the "train" lines of metrics.jsonl, in order.
        images_per_task: what each task sees at least (`train.images_per_task`); one with a stage more has logged more.
    """
    if not log:
        return []
    tasks = range(1, max(line["task"] for line in log) + 1)
    longest = images_per_task or max(line["seen"] for line in log)
    lengths = [max([longest, *(line["seen"] for line in log if line["task"] == task)]) for task in tasks]
    ends = np.cumsum([0, *lengths])
    seen = as_array([int(ends[line["task"] - 1]) + line["seen"] for line in log])
    drawn = []
    for name, title, keys, logarithmic in PANELS:
        lines = [(label, values) for key, label in keys if np.nan_to_num(values := logged(log, key)).any()]
        if len(lines) == 2 and np.array_equal(lines[0][1], lines[1][1], equal_nan=True):
            lines = lines[:1]  # nothing but the current task is learnt
        if not lines:
            continue
        figure = new_figure(5.6, 2.9)
        axes = figure.subplots()
        _curves(axes, seen, lines, logarithmic)
        tidy(axes, title, "images seen")
        _ends(axes, ends)
        if len(lines) > 1:
            axes.legend(loc="upper right", fontsize=8, frameon=False)
        drawn.append(Drawn(name, figure, alt=f"Curve of the {title} over the images seen"))
    return drawn


def logged(log: Lines, key: str) -> Values:
    """One value of each line; waits as shares of the time since the line before in the same task."""
    if not key.endswith("_share"):
        return as_array([line.get(key) for line in log])
    waited, images = as_array([line.get(key.replace("_share", "_seconds")) for line in log]), []
    rates = as_array([line.get("images_per_second") for line in log])
    before = (0, 0)
    for line in log:
        images.append(line["seen"] - (before[1] if before[0] == line["task"] else 0))
        before = line["task"], line["seen"]
    return np.minimum(waited * rates / np.maximum(as_array(images), 1.0), 1.0)


def _curves(axes: Axes, seen: Values, lines: Sequence[tuple[str, Values]], logarithmic: bool) -> None:
    step = max(1, len(seen) // POINTS)
    for (label, values), colour in zip(lines, COLOURS, strict=False):
        there = np.flatnonzero(np.isfinite(values))[::step]
        axes.plot(seen[there], values[there], color=colour, linewidth=1.1, label=label, alpha=0.85)
    if logarithmic and all((values[np.isfinite(values)] > 0).all() for _, values in lines):
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        plain_log(axes.yaxis, low, high)
    else:
        axes.set_ylim(bottom=0.0)


def _ends(axes: Axes, ends: NDArray[np.int64]) -> None:
    """A line where each task ends, `ends` from 0 on, and the tasks' numbers above."""
    tasks = len(ends) - 1
    for end in ends[1:-1]:
        axes.axvline(end, color="0.75", linewidth=0.8, zorder=0)
    every = 1 if tasks <= 12 else 5
    top = axes.secondary_xaxis("top")
    numbers = [task for task in range(1, tasks + 1) if task % every == 0 or task == 1]
    names = [f"task {task}" if tasks <= 6 else str(task) for task in numbers]
    top.set_xticks([(ends[task - 1] + ends[task]) / 2 for task in numbers], names)
    top.tick_params(length=0, labelsize=7, labelcolor="0.35")
    top.spines[:].set_visible(False)
    axes.set_xlim(0, ends[-1])
