"""Forgetting, and the result of a run (metrics.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.shards import write_atomic

Matrix = list[list[float | None]]

TASK_METRICS = ("fd", "accuracy", "share")  # measured for single tasks
MORE_TASK_METRICS = (  # where they were taken
    *("precision", "recall", "density", "coverage", "loss", "loss_bins", "bpd"),
    *("classifier_accuracy", "model_accuracy"),
)
COST_KEYS = ("train_seconds", "teacher_evaluations", "replay_points_used", "starved_seconds", "images_per_second")
FLOOR_METRICS = ("fd", "accuracy", "precision", "recall", "density", "coverage")
_ROW_ONLY = ("tasks", "task", "next_task", "extent")  # keys of an evaluation that do not go into after_task as they are


def task_forgetting(matrix: Matrix, *, higher_is_better: bool) -> list[float | None]:
    """How much worse each task is at the end than it was at its best before (Chaudhry et al. 2018, arXiv 1801.10112).

    With a[i][j] the measure of task j after learning task i, of T:
    higher is better (accuracy):  f_j = max_{i < T} a[i][j] - a[T][j]   (their equation 3)
    lower is better (FD):         f_j = a[T][j] - min_{i < T} a[i][j]
    So f_j > 0 is forgetting and f_j < 0 is backward transfer for both.

    Returns:
        One value for each task before the last, shape (T - 1,); None where a measure at the end, or every one before
        it, is missing.
    """
    last = matrix[-1]
    forgotten: list[float | None] = []
    for task, end in enumerate(last[:-1]):
        before = [value for row in matrix[task:-1] if (value := row[task]) is not None]
        if end is None or not before:
            forgotten.append(None)
        else:
            forgotten.append(max(before) - end if higher_is_better else end - min(before))
    return forgotten


def backward_transfer(matrix: Matrix) -> list[float | None]:
    """What learning the later tasks did to each task (Lopez-Paz and Ranzato 2017, arXiv 1706.08840, eq. 3).

    a[T][j] - a[j][j], with a[i][j] the accuracy on task j after learning task i: below 0 is forgetting. Unlike
    `task_forgetting` it starts from where the task was learnt, and has the sign of the accuracy.

    Returns:
        One value for each task before the last, shape (T - 1,), whose mean is their BWT; None where one is missing.
    """
    return [
        None if end is None or (learnt := matrix[task][task]) is None else end - learnt
        for task, end in enumerate(matrix[-1][:-1])
    ]


def average(values: Sequence[float | None]) -> float | None:
    """Mean of the values that are there; None where none is."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None


def metric_matrix(rows: Sequence[Mapping[str, Any]], metric: str) -> Matrix:
    """T x T: `[i][j]` of task j + 1 after learning task i + 1; None for tasks not learnt by then."""
    size = len(rows)
    matrix: Matrix = [[None] * size for _ in range(size)]
    for i, row in enumerate(rows):
        for entry in row["tasks"]:
            matrix[i][entry["task"] - 1] = entry[metric]
    return matrix


def loss_forgetting(rows: Sequence[Mapping[str, Any]]) -> list[list[float | None]]:
    """How much each task's loss has grown since it was learnt, by bin of timesteps: [j][bin], of tasks 1 ... T - 1.

    l[T][j][b] - l[j][j][b], with l[i][j] the loss of task j after learning task i: the same images and noise in both.
    None where a loss was not finite. Unlike `task_forgetting` it starts from where the task was learnt.
    """
    return [
        [
            None if end is None or learnt is None else end - learnt
            for end, learnt in zip(last["loss_bins"], row["tasks"][task]["loss_bins"], strict=True)
        ]
        for task, (row, last) in enumerate(zip(rows[:-1], rows[-1]["tasks"][:-1], strict=True))
    ]


def losses_before(rows: Sequence[Mapping[str, Any]]) -> list[list[float | None] | None]:
    """The loss of each task, by bin of timesteps, of the model before it learnt the task; None of the first task."""
    return [None, *(row["next_task"]["loss_bins"] for row in rows[:-1])]


def floor_matrices(rows: Sequence[Mapping[str, Any]]) -> dict[str, Matrix]:
    """FLOOR_METRICS of a second set of real images in place of the samples, as `metric_matrix` gives them."""
    floors = [row["floor"] for row in rows]
    return {metric: metric_matrix(floors, metric) for metric in FLOOR_METRICS}


def result(
    method: str, rows: Sequence[Mapping[str, Any]], cost: Mapping[str, float | None], **extra: Any
) -> dict[str, Any]:
    """The contents of metrics.json.

    Args:
        method: name of the method.
        rows: one evaluation (`evaluate.evaluate`) after each task, in order; all by the same evaluator.
        cost: COST_KEYS, and more where there is more to say.
        extra: further keys ("seed").

    Returns:
        {"method", "tasks", "matrix", "after_task", "final", "cost", "evaluator", ...}.
        matrix: {"fd", "accuracy", "share"} and MORE_TASK_METRICS as far as taken. final: the last of after_task plus
        "forgetting" (mean over tasks, of the FD), "forgetting_accuracy", "forgetting_per_task" (of the FD) and
        "lost_tasks": tasks whose FD could not be taken at the end any more, because an unconditional model generates
        (nearly) nothing of them; they have no value in "forgetting". With losses final has "forgetting_loss" (mean over
        tasks and bins) and "forgetting_loss_bins" (`loss_forgetting`), and there is "loss_before" (`losses_before`).
        With a classifier that learns the tasks final has "forgetting_classifier_accuracy", like "forgetting_accuracy".
        With one in the model it has "average_accuracy" (ACC of Lopez-Paz and Ranzato 2017, eq. 2: the mean over tasks
        of its accuracies at the end), "forgetting_model_accuracy" and "backward_transfer", both as means over tasks.
        floor: `floor_matrices`; over the classes seen it is in after_task and final, as their own "floor".
    """
    assert rows and len({row["evaluator"] for row in rows}) == 1, "rows of one evaluator"
    missing = [key for key in COST_KEYS if key not in cost]
    assert not missing, f"cost lacks {missing}"
    taken = {key for entry in rows[-1]["tasks"] for key in entry}
    metrics = [*TASK_METRICS, *(metric for metric in MORE_TASK_METRICS if metric in taken)]
    matrices = {metric: metric_matrix(rows, metric) for metric in metrics}
    after = [_after(row) for row in rows]
    final = after[-1] | _forgetting(matrices)
    content: dict[str, Any] = {
        "method": method,
        "tasks": len(rows),
        "matrix": matrices,
        "after_task": after,
        "final": final,
        "cost": dict(cost),
        "evaluator": rows[0]["evaluator"],
    }
    if "loss_bins" in taken:
        bins = loss_forgetting(rows)
        content["final"] |= {
            "forgetting_loss": average([value for task in bins for value in task]),
            "forgetting_loss_bins": bins,
        }
        content["loss_before"] = losses_before(rows)
    if "classifier_accuracy" in taken:
        forgotten = task_forgetting(matrices["classifier_accuracy"], higher_is_better=True)
        content["final"]["forgetting_classifier_accuracy"] = average(forgotten)
    if "model_accuracy" in taken:
        content["final"] |= _of_the_model(matrices["model_accuracy"])
    if "floor" in rows[-1]:
        content["floor"] = floor_matrices(rows)
    return content | extra


def _forgetting(matrices: Mapping[str, Matrix]) -> dict[str, Any]:
    fd = task_forgetting(matrices["fd"], higher_is_better=False)
    return {
        "forgetting": average(fd),
        "forgetting_accuracy": average(task_forgetting(matrices["accuracy"], higher_is_better=True)),
        "forgetting_per_task": fd,
        "lost_tasks": [task + 1 for task, value in enumerate(matrices["fd"][-1]) if value is None],
    }


def _of_the_model(matrix: Matrix) -> dict[str, Any]:
    """The accuracy of the model's own classifier in single numbers."""
    return {
        "average_accuracy": average(matrix[-1]),
        "forgetting_model_accuracy": average(task_forgetting(matrix, higher_is_better=True)),
        "backward_transfer": average(backward_transfer(matrix)),
    }


def _after(row: Mapping[str, Any]) -> dict[str, Any]:
    after = {key: value for key, value in row.items() if key not in _ROW_ONLY}
    if "floor" in after:
        after["floor"] = {key: value for key, value in after["floor"].items() if key not in _ROW_ONLY}
    return after


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically; refuses NaN and infinity (ValueError), which are not JSON."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
