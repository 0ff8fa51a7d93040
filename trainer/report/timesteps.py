"""Figures by timestep: losses before, after and at the end, forgetting by bin, the terms of the likelihood bound."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from trainer.report.drawing import (
    BEFORE,
    END,
    LEARNT,
    Drawn,
    colour_bar,
    heat_map,
    new_figure,
    task_ticks,
    tidy,
)
from trainer.report.html import Html, folded, table
from trainer.report.measures import Values, as_array, digits

LINES = ("before it was learnt", "right after", "at the end")
COLUMNS = 5  # tasks in a row of small figures
ANNOTATED_BINS = 12  # more and only some have their timesteps below them
BPD_LINES = 8  # more tasks than this and only some have a line in the legend
Result = Mapping[str, Any]


def has_bins(result: Result) -> bool:
    return bool(result["matrix"].get("loss_bins"))


def task_bins(result: Result, after: int, task: int) -> Values:
    """(bins,): the loss of a task by bin of timesteps, after learning task `after`; both from 1."""
    return as_array(result["matrix"]["loss_bins"][after - 1][task - 1] or [])


def bin_edges(bins: int, timesteps: int) -> Values:
    return np.linspace(0, timesteps, bins + 1)


def loss_curves(result: Result, timesteps: int) -> Drawn | None:
    """For each task the loss by bin before it was learnt, right after, and at the end."""
    if not has_bins(result):
        return None
    tasks = len(result["after_task"])
    columns = min(COLUMNS, tasks)
    rows = math.ceil(tasks / columns)
    figure = new_figure(max(4.6, 2.5 * columns), 0.45 + 2.1 * rows)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for task, axes in enumerate(panels[:tasks], 1):
        _task_lines(axes, result, task, timesteps)
        under = task + columns > tasks
        tidy(axes, f"task {task}", "timestep" if under else "", "loss" if (task - 1) % columns == 0 else "")
        axes.tick_params(labelbottom=under)
    for axes in panels[tasks:]:
        axes.set_visible(False)
    named = {str(line.get_label()): line for axes in panels[:tasks] for line in axes.get_lines()}
    lines = {label: named[label] for label in LINES if label in named}
    figure.legend(list(lines.values()), list(lines), loc="outside upper left", ncols=3, fontsize=9, frameon=False)
    return Drawn(
        "timestep-loss",
        figure,
        alt="For each task: curves of the loss by timestep before it was learnt, right after, and at the end",
        caption="Mean squared error of the prediction on test images, in equal bins of timesteps: the same images and "
        "noise in every line. 0 is the clean image. Log scale.",
        numbers=_loss_table(result, timesteps),
        wide=tasks > 1,
    )


def lines_of(result: Result, task: int) -> list[tuple[str, Values, str, str]]:
    """Label, values by bin, colour and style of each line of a task that is known."""
    tasks = len(result["after_task"])
    before = (result.get("loss_before") or [None] * tasks)[task - 1]
    lines = [(LINES[1], task_bins(result, task, task), LEARNT, "-")]
    if before is not None:
        lines.insert(0, (LINES[0], as_array(before), BEFORE, "--"))
    if task < tasks:
        lines.append((LINES[2], task_bins(result, tasks, task), END, "-"))
    return lines


def _task_lines(axes: Axes, result: Result, task: int, timesteps: int) -> None:
    for label, values, colour, style in lines_of(result, task):
        edges = bin_edges(len(values), timesteps)
        axes.plot((edges[:-1] + edges[1:]) / 2, values, style, marker="o", markersize=3, color=colour, label=label)
    axes.set_yscale("log")
    axes.set_xlim(0, timesteps)


def _loss_table(result: Result, timesteps: int) -> Html:
    header = ["task, when", *bin_names(len(task_bins(result, 1, 1)), timesteps)]
    rows = [
        [f"task {task}, {label}", *(digits(float(value)) for value in values)]
        for task in range(1, len(result["after_task"]) + 1)
        for label, values, _, _ in lines_of(result, task)
    ]
    return folded("as numbers", table(header, rows))


# --- forgetting by bin ------------------------------------------------------------------------------------------


def forgetting_bins(result: Result) -> Values | None:
    """(T - 1, bins): by how much the loss of each task has grown since it was learnt; None where it is not known."""
    bins = result["final"].get("forgetting_loss_bins")
    return as_array(bins) if bins else None


def grown_shares(result: Result) -> Values:
    """The same as a share of the loss right after the task was learnt."""
    grown = forgetting_bins(result)
    assert grown is not None
    return grown / np.stack([task_bins(result, task, task) for task in range(1, len(grown) + 1)])


def forgetting_map(result: Result, timesteps: int) -> Drawn | None:
    """Forgetting of each task by bin of timesteps, as it is and as a share of the loss that there was."""
    grown = forgetting_bins(result)
    if grown is None:
        return None
    figure = new_figure(11.5, 1.5 + 0.32 * len(grown))
    left, right = figure.subplots(1, 2)
    _bins_panel(
        figure, left, grown, [[_signed(value) for value in row] for row in grown], timesteps, "growth of the loss"
    )
    shares = 100 * grown_shares(result)
    texts = [[f"{value:+.0f}" if np.isfinite(value) else "" for value in row] for row in shares]
    _bins_panel(figure, right, shares, texts, timesteps, "growth in % of the loss right after the task")
    header = ["task", *bin_names(grown.shape[1], timesteps)]
    rows = [[str(task), *(digits(float(value)) for value in row)] for task, row in enumerate(grown, 1)]
    return Drawn(
        "timestep-forgetting",
        figure,
        alt="Heat maps of the forgetting of each task (rows) in each bin of timesteps (columns)",
        caption="From right after a task was learnt to the end. Red is forgetting, blue is backward transfer.",
        numbers=folded("as numbers", table(header, rows)),
        wide=True,
    )


def _bins_panel(
    figure: Figure, axes: Axes, values: Values, texts: Sequence[Sequence[str]], timesteps: int, title: str
) -> None:
    known = np.abs(values[np.isfinite(values)])
    largest = float(known.max()) if known.size and known.max() > 0 else 1.0
    norm = TwoSlopeNorm(0.0, -largest, largest)
    heat_map(axes, values, (matplotlib.colormaps["RdBu_r"], norm), texts)
    names = bin_names(values.shape[1], timesteps)
    every = math.ceil(len(names) / ANNOTATED_BINS)
    axes.set_xticks(range(0, len(names), every), names[::every], rotation=40, ha="right", rotation_mode="anchor")
    ticks = task_ticks(len(values))
    axes.set_yticks([tick - 1 for tick in ticks], [str(tick) for tick in ticks])
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("timesteps", fontsize=9)
    axes.set_ylabel("task", fontsize=9)
    colour_bar(figure, axes)


def bin_names(bins: int, timesteps: int) -> list[str]:
    edges = bin_edges(bins, timesteps)
    return [f"{low:.0f}-{high:.0f}" for low, high in pairwise(edges)]


def _signed(value: float) -> str:
    """Two digits, without the leading zero, with a sign."""
    if not np.isfinite(value):
        return ""
    return f"{value:+.2g}".replace("0.", ".", 1) if abs(value) >= 0.001 else f"{value:+.0e}".replace("e-0", "e-")


# --- the bound --------------------------------------------------------------------------------------------------


def bound_figure(result: Result) -> Drawn | None:
    """The terms of the likelihood bound by timestep, after each task; None where they were not measured."""
    rows = [(after, row) for after, row in enumerate(result["after_task"], 1) if row.get("bpd_terms")]
    if not rows:
        return None
    figure = new_figure(7.0, 3.4)
    axes = figure.subplots()
    chosen = matplotlib.colormaps["viridis"](np.linspace(0.0, 0.85, len(rows)))
    for colour, (after, row) in zip(chosen, rows, strict=True):
        edges, terms = as_array(row["bpd_edges"]), as_array(row["bpd_terms"])
        told = len(rows) <= BPD_LINES or after in (rows[0][0], rows[-1][0])
        axes.stairs(terms / np.diff(edges), edges, color=tuple(colour), label=f"after task {after}" if told else None)
    axes.set(xscale="log", yscale="log")
    tidy(axes, "terms of the bound, all classes seen", "timestep", "bits per dimension and timestep")
    axes.legend(loc="upper right", fontsize=8, frameon=False)
    final = result["final"]
    caption = ""
    if final.get("bpd_prior") is not None and final.get("bpd_decoder") is not None:
        caption = (
            f"At the end: {digits(final['bpd'])} bits per dimension, of which {digits(final['bpd_decoder'])} are the "
            f"decoder's (L_0) and {digits(final['bpd_prior'])} the prior's (L_T); the rest are these terms. The least "
            "noisy timesteps dominate the bound, and say little of what samples look like."
        )
    return Drawn(
        "likelihood",
        figure,
        alt="Curves of the terms of the likelihood bound by timestep, one after each task",
        caption=caption,
        numbers=_terms_table(rows),
        wide=True,
    )


def _terms_table(rows: Sequence[tuple[int, Mapping[str, Any]]]) -> Html:
    header = ["after task", "bits/dim", "standard error", "L_0", "sum of L_t", "L_T", "images"]
    lines = [
        [
            str(after),
            *(digits(row.get(key)) for key in ("bpd", "bpd_standard_error", "bpd_decoder")),
            digits(float(as_array(row["bpd_terms"]).sum())),
            digits(row.get("bpd_prior")),
            str(row.get("bpd_images", "")),
        ]
        for after, row in rows
    ]
    return folded("as numbers", table(header, lines))
