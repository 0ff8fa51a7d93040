"""A result as a run of several tasks makes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from trainer.evaluation.forgetting import result

COST = {
    "train_seconds": 75.2,
    "teacher_evaluations": 123456,
    "replay_points_used": 64000,
    "starved_seconds": 3.25,
    "images_per_second": 1234.5,
    "wall_seconds": 3725.0,
}
MakeResult = Callable[..., dict[str, Any]]


@pytest.fixture
def make_result() -> MakeResult:
    """FD of task j after task i: 10 * j + i - j; unconditional: a task is lost three tasks later; classifying: the
    model has a classifier, which is right on 1 - 0.1 (i - j) of task j, and floors."""

    def make(tasks: int, conditional: bool = True, classifying: bool = False) -> dict[str, Any]:
        rows = []
        for i in range(1, tasks + 1):
            entries = [
                {
                    "task": j,
                    "samples": 400,
                    "fd": 10.0 * j + i - j if conditional or i - j < 3 else None,
                    "accuracy": 1 - 0.02 * (i - j) if conditional else None,
                    "share": 1 / i,
                }
                for j in range(1, i + 1)
            ]
            accuracy = 1 - 0.02 * i if conditional else None
            common = {"samples": 2000, "evaluator": "e", "fd_reference": "test"}
            rows.append({"fd": 100.0 + i, "kld": 0.01 * i, "accuracy": accuracy, "tasks": entries, **common})
        for i, row in enumerate(rows if classifying else [], 1):
            row |= {"model_accuracy": 1 - 0.05 * (i - 1), "model_images": 1000 * i, "real_images": 900}
            row["probe"] = {"timesteps": [0, 50], "linear": [0.8, 0.875], "knn": [None, None], "neighbours": 5}
            row["probe"] |= {"images": 300, "test_images": 1200}
            measures = dict.fromkeys(("precision", "recall", "density", "coverage"), 0.5)
            floors = [{"task": j, "fd": 1.0, "accuracy": None, **measures} for j in range(1, i + 1)]
            row |= measures | {"floor": {"fd": 1.0, "kld": 0.0, "accuracy": None, **measures, "tasks": floors}}
            for entry in row["tasks"]:
                entry["model_accuracy"] = 1 - 0.1 * (i - entry["task"])
        return result("finetune", rows, COST, seed=4)

    return make
