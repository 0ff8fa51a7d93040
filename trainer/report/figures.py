"""Figures of the measures of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from trainer.evaluation.forgetting import task_forgetting
from trainer.report.drawing import (
    COLOURS,
    Drawn,
    colour_bar,
    colour_norm,
    matrix_panel,
    new_figure,
    task_axis,
    tidy,
)
from trainer.report.html import Html, folded, table
from trainer.report.measures import BY_KEY, MEASURES, Measure, Values, as_array, digits, matrix_of, number

SIDE = (4.6, 3.7)  # inches of a figure that stands beside others
DUE = " Coloured by the share that is due to the task's classes: the lightest is all of it."
Result = Mapping[str, Any]


def matrix_figures(result: Result, task_classes: Sequence[Sequence[int]] = ()) -> list[Drawn]:
    """A heat map of each measure that was taken of single tasks.

    Args:
        task_classes: class ids of each task, by which the share of samples due to each is told; equal without.
    """
    floors = result.get("floor") or {}
    drawn = []
    for measure in MEASURES:
        matrix = matrix_of(result["matrix"], measure.key)
        if matrix is None:
            continue
        floor = matrix_of(floors, measure.key)
        drawn.append(_matrix(measure, matrix, None if floor is None else floor[-1], task_classes))
    return drawn


def _matrix(measure: Measure, matrix: Values, floor: Values | None, task_classes: Sequence[Sequence[int]]) -> Drawn:
    shades = matrix / due_shares(len(matrix), task_classes) if measure.key == "share" else None
    figure = new_figure(*SIDE)
    axes = figure.subplots()
    norm = colour_norm(measure, [matrix] if floor is None else [matrix, floor])
    matrix_panel(axes, matrix, measure, norm, floor=floor, shades=shades)
    if shades is None:
        colour_bar(figure, axes, percent=measure.share)
    caption = f"{measure.title}: {measure.meaning}; {measure.sense}."
    if measure.key == "share":
        caption += DUE
    return Drawn(
        f"matrix-{measure.key.replace('_', '-')}",
        figure,
        alt=f"Heat map of {measure.title} of each task (columns) after learning each task (rows)",
        caption=caption,
        numbers=matrix_table(measure, matrix, floor),
    )


def due_shares(tasks: int, task_classes: Sequence[Sequence[int]]) -> Values:
    """(T, 1) or (T, T): the share of samples due to task j after learning task i, NaN where it is not learnt."""
    sizes = np.array([len(classes) for classes in task_classes] or [1] * tasks, dtype=np.float64)
    due = sizes[None, :] / np.cumsum(sizes)[:, None]
    due[np.triu_indices(tasks, 1)] = np.nan
    return due


def matrix_table(measure: Measure, matrix: Values, floor: Values | None = None) -> Html:
    """The same numbers as text."""
    header = ["after task", *(f"task {task}" for task in range(1, len(matrix) + 1))]
    rows = [[str(i), *(digits(float(value), measure) for value in row)] for i, row in enumerate(matrix, 1)]
    if floor is not None:
        rows.append(["floor", *(digits(float(value), measure) for value in floor)])
    return folded("as numbers", table(header, rows))


# --- over all classes seen --------------------------------------------------------------------------------------

CURVES = (
    *(("fd",), ("kld",), ("accuracy", "classifier_accuracy", "model_accuracy")),
    *(("precision", "recall"), ("density", "coverage")),
)


def course_figures(result: Result) -> list[Drawn]:
    """Measures over all classes seen, after each task, each with its floor dashed."""
    drawn = []
    for keys in CURVES:
        lines = [(BY_KEY[key], course_of(result, key)) for key in keys]
        lines = [(measure, values) for measure, values in lines if np.isfinite(values).any()]
        if not lines:
            continue
        figure = new_figure(SIDE[0], 3.0)
        axes = figure.subplots()
        for (measure, values), colour in zip(lines, COLOURS, strict=False):
            _course(axes, measure, values, floor_course(result, measure.key), colour)
        names = " and ".join(measure.title for measure, _ in lines)
        tidy(axes, f"{names}, all classes seen", "after learning task")
        task_axis(axes, len(result["after_task"]))
        axes.set_ylim(bottom=0.0, top=_top(lines))
        if len(lines) > 1:
            axes.legend(fontsize=8, frameon=False)
        drawn.append(Drawn(f"course-{keys[0]}", figure, alt=f"Curve of {names} over all classes seen, after each task"))
    return drawn


def course_of(result: Result, key: str) -> Values:
    """(T,): a measure over all classes seen, after each task."""
    return as_array([row.get(key) for row in result["after_task"]])


def floor_course(result: Result, key: str) -> Values:
    return as_array([(row.get("floor") or {}).get(key) for row in result["after_task"]])


def _course(axes: Axes, measure: Measure, values: Values, floor: Values, colour: str) -> None:
    tasks = np.arange(1, len(values) + 1)
    axes.plot(tasks, values, "o-", color=colour, markersize=4, label=measure.title)
    if np.isfinite(floor).any():
        axes.plot(tasks, floor, "--", color=colour, linewidth=1)


def _top(lines: Sequence[tuple[Measure, Values]]) -> float | None:
    shares = all(measure.share for measure, _ in lines)
    return max(1.02, 1.05 * max(float(np.nanmax(values)) for _, values in lines)) if shares else None


# --- forgetting -------------------------------------------------------------------------------------------------


def task_forgettings(result: Result) -> dict[str, Values]:
    """By measure: how much worse each task but the last is at the end than at its best before (the loss: than when it
    was learnt), shape (T - 1,)."""
    found: dict[str, Values] = {}
    for key in ("fd", "accuracy", "classifier_accuracy", "model_accuracy"):
        matrix = matrix_of(result["matrix"], key)
        if matrix is not None and len(matrix) > 1:
            rows = [[number(value) for value in row] for row in matrix.tolist()]
            found[key] = as_array(task_forgetting(rows, higher_is_better=BY_KEY[key].higher_is_better))
    bins = result["final"].get("forgetting_loss_bins")
    if bins:
        found["loss"] = np.array([_mean(as_array(task)) for task in bins])
    return {key: values for key, values in found.items() if np.isfinite(values).any()}


def _mean(values: Values) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def forgetting_figure(result: Result) -> Drawn | None:
    """Bars by task; None for one task."""
    found = task_forgettings(result)
    if not found:
        return None
    figure = new_figure(min(12.0, 3.4 * len(found) + 0.6), 2.9)
    for axes, (key, values) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        tasks = np.arange(1, len(values) + 1)
        axes.bar(tasks, np.nan_to_num(values), color=np.where(values > 0, "#b2182b", "#4393c3").tolist(), width=0.65)
        axes.axhline(0.0, color="0.2", linewidth=0.8)
        for task in tasks[~np.isfinite(values)]:
            axes.text(task, 0.0, "lost", ha="center", va="bottom", fontsize=8)
        tidy(axes, f"{BY_KEY[key].title}", "task")
        task_axis(axes, len(values))
    header = ["task", *(BY_KEY[key].title for key in found)]
    rows = [
        [str(j + 1), *(digits(float(values[j]), BY_KEY[key]) for key, values in found.items())]
        for j in range(len(_first(found)))
    ]
    rows.append(["mean", *(digits(_mean(values), BY_KEY[key]) for key, values in found.items())])
    return Drawn(
        "forgetting",
        figure,
        alt=f"Bars of the forgetting of each task by {', '.join(BY_KEY[key].title for key in found)}",
        caption="Above zero is forgetting, below is backward transfer.",
        numbers=folded("as numbers", table(header, rows)),
        wide=len(found) > 1,
    )


def _first(found: Mapping[str, Values]) -> Values:
    return next(iter(found.values()))


def memorisation_figure(result: Result) -> Drawn | None:
    """Share of memorised samples after each task, of each set of learnt images; None where it was not measured."""
    rows = [row.get("nearest") or {} for row in result["after_task"]]
    names = sorted({name for row in rows for name in row})
    if not names:
        return None
    figure = new_figure(SIDE[0], 3.0)
    axes = figure.subplots()
    tasks = np.arange(1, len(rows) + 1)
    for name, colour in zip(names, COLOURS, strict=False):
        values = {
            key: as_array([row.get(name, {}).get("features", {}).get(key) for row in rows])
            for key in ("memorised", "held_out_memorised")
        }
        axes.plot(tasks, values["memorised"], "o-", color=colour, markersize=4, label=f"{name}: samples")
        axes.plot(tasks, values["held_out_memorised"], "--", color=colour, linewidth=1, label=f"{name}: test images")
    tidy(axes, "share nearer to a learnt image than real ones are", "after learning task")
    task_axis(axes, len(rows))
    axes.set_ylim(bottom=0.0)
    axes.legend(fontsize=8, frameon=False)
    return Drawn("memorisation", figure, alt="Curve of the share of memorised samples after each task, in features")
