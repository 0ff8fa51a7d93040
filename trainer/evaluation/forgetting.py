"""Forgetting, and the result of a run (metrics.json)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.data.shards import write_atomic

Matrix = list[list[float | None]]

TASK_METRICS = ("fd", "accuracy", "share")  # measured for single tasks
COST_KEYS = ("train_seconds", "teacher_evaluations", "replay_points_used", "starved_seconds", "images_per_second")
_ROW_ONLY = ("tasks", "task")  # keys of an evaluation that go into the matrix, not into after_task


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
        {"method", "tasks", "matrix": {"fd", "accuracy", "share"}, "after_task", "final", "cost", "evaluator", ...}.
        final is the last of after_task plus "forgetting" (mean over tasks, of the FD), "forgetting_accuracy",
        "forgetting_per_task" (of the FD) and "lost_tasks": tasks whose FD could not be taken at the end any more,
        because an unconditional model generates (nearly) nothing of them; they have no value in "forgetting".
    """
    assert rows and len({row["evaluator"] for row in rows}) == 1, "rows of one evaluator"
    missing = [key for key in COST_KEYS if key not in cost]
    assert not missing, f"cost lacks {missing}"
    matrices = {metric: metric_matrix(rows, metric) for metric in TASK_METRICS}
    fd = task_forgetting(matrices["fd"], higher_is_better=False)
    accuracy = task_forgetting(matrices["accuracy"], higher_is_better=True)
    after = [{key: value for key, value in row.items() if key not in _ROW_ONLY} for row in rows]
    final = after[-1] | {
        "forgetting": average(fd),
        "forgetting_accuracy": average(accuracy),
        "forgetting_per_task": fd,
        "lost_tasks": [task + 1 for task, value in enumerate(matrices["fd"][-1]) if value is None],
    }
    content = {
        "method": method,
        "tasks": len(rows),
        "matrix": matrices,
        "after_task": after,
        "final": final,
        "cost": dict(cost),
        "evaluator": rows[0]["evaluator"],
    }
    return content | extra


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write atomically; refuses NaN and infinity (ValueError), which are not JSON."""
    write_atomic(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
