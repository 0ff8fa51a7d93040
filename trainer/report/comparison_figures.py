"""Figures over many runs: rows of a comparison, each with its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trainer.report.drawing import Drawn, colour_bar, colour_norm, colours, matrix_panel, new_figure, task_axis, tidy
from trainer.report.figures import DUE, course_of, due_shares
from trainer.report.html import Html, folded, join, table
from trainer.report.measures import BY_KEY, Measure, Values, digits, matrix_of, number
from trainer.report.spread import band, spread_name
from trainer.report.timesteps import bin_edges, bin_names, forgetting_bins, grown_shares

FINAL = ("fd", "kld", "accuracy", "classifier_accuracy", "model_accuracy", "forgetting")
MATRICES = ("fd", "accuracy", "classifier_accuracy", "model_accuracy", "share", "loss")
ACROSS = 4  # heat maps beside each other


@dataclass(frozen=True)
class Member:
    """One run; `result` is its metrics.json, `error` why there is none."""

    seed: int
    directory: Path
    result: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Group:
    """A row of the comparison."""

    name: str
    members: tuple[Member, ...]

    @property
    def results(self) -> list[Mapping[str, Any]]:
        return [member.result for member in self.members if member.result is not None]


def overview(groups: Sequence[Group], mean: bool) -> Drawn:
    """What each seed ends with, as dots with a bar at their middle; below, the course over the tasks and its spread."""
    keys = [key for key in FINAL if any(number(result["final"].get(key)) is not None for result in _all(groups))]
    figure = new_figure(min(13.0, 3.2 * len(keys) + 0.6), 6.2)
    above, below = figure.subplots(2, len(keys), squeeze=False)
    for place, key in enumerate(keys):
        _final(above[place], groups, key, mean)
        if key in BY_KEY:
            _course(below[place], groups, BY_KEY[key], mean)
        else:
            below[place].set_axis_off()
    handles, labels = below[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=min(5, len(labels)), fontsize=9, frameon=False)
    return Drawn(
        "compare",
        figure,
        alt=f"Final values by row, a dot for each seed, and curves over the tasks ({spread_name(mean)})",
        caption=f"Dots: seeds; bars: their {'mean' if mean else 'median'}. Below, over all classes seen, after each "
        f"task: {'mean and one standard deviation to each side' if mean else 'median and range'}.",
        wide=True,
    )


def _all(groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    return [result for group in groups for result in group.results]


def _final(axes: Axes, groups: Sequence[Group], key: str, mean: bool) -> None:
    chosen = colours(len(groups))
    for place, (group, colour) in enumerate(zip(groups, chosen, strict=True)):
        values = [value for result in group.results if (value := number(result["final"].get(key))) is not None]
        if values:
            middle = float(band(np.array(values)[:, None], mean)[0][0])
            axes.plot([place] * len(values), values, "o", color=colour, alpha=0.7, markersize=5)
            axes.plot([place - 0.25, place + 0.25], [middle, middle], color=colour, linewidth=2)
    title = BY_KEY[key].title if key in BY_KEY else "forgetting of FD"
    tidy(axes, f"final {title}")
    axes.set_xticks(range(len(groups)), [_fitting(group.name) for group in groups], rotation=25, ha="right")
    axes.set_xlim(-0.6, len(groups) - 0.4)
    low, _ = axes.get_ylim()
    axes.set_ylim(bottom=min(0.0, low))


def _fitting(name: str) -> str:
    return name if len(name) <= 24 else name[:23] + "…"


def _course(axes: Axes, groups: Sequence[Group], measure: Measure, mean: bool) -> None:
    tasks = 1
    for group, colour in zip(groups, colours(len(groups)), strict=True):
        if group.results:
            values = np.stack([course_of(result, measure.key) for result in group.results])
            tasks = max(tasks, values.shape[1])
            _line(axes, np.arange(1, values.shape[1] + 1), values, colour, group.name, mean)
    tidy(axes, f"{measure.title}, all classes seen", "after learning task")
    task_axis(axes, tasks)
    low, _ = axes.get_ylim()
    axes.set_ylim(bottom=min(0.0, low))


def _line(axes: Axes, places: Values, values: Values, colour: str, name: str, mean: bool) -> None:
    middle, low, high = band(values, mean)
    axes.plot(places, middle, "o-", color=colour, markersize=4, label=_fitting(name))
    axes.fill_between(places, low, high, color=colour, alpha=0.18, linewidth=0)


def timestep_figure(groups: Sequence[Group], timesteps: int, mean: bool) -> Drawn | None:
    """Forgetting by bin of timesteps, a mean over the tasks, with its spread over seeds; None where not measured."""
    known = [(group, [result for result in group.results if forgetting_bins(result) is not None]) for group in groups]
    if not any(results for _, results in known):
        return None
    figure = new_figure(11.0, 3.4)
    left, right = figure.subplots(1, 2)
    rows = []
    for (group, results), colour in zip(known, colours(len(groups)), strict=True):
        if not results:
            continue
        grown = np.stack([task_mean(forgetting_bins(result)) for result in results])
        shares = np.stack([task_mean(100 * grown_shares(result)) for result in results])
        edges = bin_edges(grown.shape[1], timesteps)
        _line(left, (edges[:-1] + edges[1:]) / 2, grown, colour, group.name, mean)
        _line(right, (edges[:-1] + edges[1:]) / 2, shares, colour, group.name, mean)
        rows.append([group.name, *(digits(float(value)) for value in band(grown, mean)[0])])
    for axes, title in ((left, "growth of the loss"), (right, "growth in % of the loss right after the task")):
        tidy(axes, title, "timestep")
        axes.axhline(0.0, color="0.2", linewidth=0.8)
        axes.set_xlim(0, timesteps)
    left.legend(fontsize=8, frameon=False)
    header = ["row", *bin_names(max(map(len, rows)) - 1, timesteps)]
    return Drawn(
        "compare-timesteps",
        figure,
        alt="Curves of the forgetting by timestep, one for each row of the comparison",
        caption="From right after a task was learnt to the end, as a mean over the tasks. Above zero is forgetting.",
        numbers=folded("as numbers", table(header, rows)),
        wide=True,
    )


def task_mean(values: Values | None) -> Values:
    """(bins,): the mean over the tasks that are known, of (T, bins)."""
    assert values is not None
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / np.where(known.any(axis=0), known.sum(axis=0), np.nan)


def matrix_comparisons(groups: Sequence[Group], mean: bool, task_classes: Sequence[Sequence[int]] = ()) -> list[Drawn]:
    """For each measure the rows' heat maps, all on one scale: the middle over seeds. `task_classes` as in
    `figures.matrix_figures`."""
    drawn = []
    for key in MATRICES:
        measure, middles = BY_KEY[key], {}
        for group in groups:
            found = [matrix for result in group.results if (matrix := matrix_of(result["matrix"], key)) is not None]
            if found:
                middles[group.name] = band(np.stack(found), mean)[0]
        if middles:
            drawn.append(_matrices(measure, middles, mean, task_classes))
    return drawn


def _matrices(
    measure: Measure, middles: Mapping[str, Values], mean: bool, task_classes: Sequence[Sequence[int]]
) -> Drawn:
    columns = min(ACROSS, len(middles))
    rows = math.ceil(len(middles) / columns)
    figure = new_figure(3.0 * columns + 0.7, 2.9 * rows + 0.3)
    figure.suptitle(measure.title + (", %" if measure.share else ""), fontsize=11, x=0.01, ha="left")
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    norm = colour_norm(measure, list(middles.values()))
    for axes, (name, matrix) in zip(panels, middles.items(), strict=False):
        due = due_shares(len(matrix), task_classes if len(task_classes) == len(matrix) else ())
        matrix_panel(axes, matrix, measure, norm, shades=matrix / due if measure.key == "share" else None)
        axes.set_title(_fitting(name), fontsize=10, loc="left")
    for axes in panels[len(middles) :]:
        axes.set_visible(False)
    if measure.key != "share":
        colour_bar(figure, panels[: len(middles)], percent=measure.share)
    caption = f"{measure.title}, {'mean' if mean else 'median'} over seeds: {measure.meaning}; {measure.sense}."
    return Drawn(
        f"compare-matrix-{measure.key.replace('_', '-')}",
        figure,
        alt=f"Heat maps of {measure.title} of each task after each task, one for each row of the comparison",
        caption=caption + (DUE if measure.key == "share" else ""),
        numbers=folded("as numbers", join(_numbers(name, matrix, measure) for name, matrix in middles.items())),
        wide=True,
    )


def _numbers(name: str, matrix: Values, measure: Measure) -> Html:
    header = [f"{name}, after task", *(f"task {task}" for task in range(1, len(matrix) + 1))]
    return table(header, [[str(i), *(digits(float(v), measure) for v in row)] for i, row in enumerate(matrix, 1)])
