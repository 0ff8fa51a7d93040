"""Forgetting of hand-made matrices, and the contract of metrics.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.forgetting import average, metric_matrix, result, task_forgetting, write_json

COST = {
    "train_seconds": 10.0,
    "teacher_evaluations": 5,
    "replay_points_used": 6,
    "starved_seconds": 0.0,
    "images_per_second": 7.0,
}


def row(task: int, fd: list[float | None], accuracy: list[float | None], evaluator: str = "e") -> dict[str, Any]:
    entries = [
        {"task": j, "samples": 40, "fd": f, "accuracy": a, "share": 0.5}
        for j, (f, a) in enumerate(zip(fd, accuracy, strict=True), 1)
    ]
    shared = {"samples": 40 * task, "evaluator": evaluator, "fd_reference": "test"}
    return {"fd": 9.0 + task, "kld": 0.1, "accuracy": accuracy[-1], "tasks": entries, **shared}


ROWS = [
    row(1, [5.0], [0.9]),
    row(2, [9.0, 4.0], [0.95, 0.8]),
    row(3, [25.0, 3.0, 2.0], [0.5, 0.9, 1.0]),
]


def test_forgetting_is_final_against_best_before_with_one_sign_for_both_kinds() -> None:
    fd, accuracy = metric_matrix(ROWS, "fd"), metric_matrix(ROWS, "accuracy")
    assert fd == [[5.0, None, None], [9.0, 4.0, None], [25.0, 3.0, 2.0]]
    assert task_forgetting(fd, higher_is_better=False) == [20.0, -1.0]  # task 2 got better: backward transfer
    assert task_forgetting(accuracy, higher_is_better=True) == pytest.approx([0.45, -0.1])


def test_missing_values_and_a_single_task() -> None:
    assert task_forgetting([[1.0, None, None], [2.0, None, None], [None, 7.0, 1.0]], higher_is_better=False) == [
        None,
        None,
    ]
    assert task_forgetting([[1.0]], higher_is_better=False) == []
    assert average([]) is None and average([None, 2.0, 4.0]) == 3.0


def test_result_is_the_contract(tmp_path: Path) -> None:
    content = result("finetune", ROWS, COST, seed=3)
    assert list(content)[:6] == ["method", "tasks", "matrix", "after_task", "final", "cost"]
    assert (content["method"], content["tasks"], content["seed"]) == ("finetune", 3, 3)
    assert content["matrix"]["accuracy"][0] == [0.9, None, None]
    assert [len(line) for line in content["matrix"]["share"]] == [3, 3, 3]
    assert content["after_task"][1] == {
        "fd": 11.0,
        "kld": 0.1,
        "accuracy": 0.8,
        "samples": 80,
        "evaluator": "e",
        "fd_reference": "test",
    }
    final = content["final"]
    assert final["fd"] == 12.0 and final["forgetting"] == 9.5 and final["forgetting_per_task"] == [20.0, -1.0]
    assert final["forgetting_accuracy"] == pytest.approx(0.175) and final["lost_tasks"] == []
    assert content["cost"] == COST
    write_json(tmp_path / "metrics.json", content)
    assert json.loads((tmp_path / "metrics.json").read_text()) == content


def test_an_unconditional_run_that_lost_a_task() -> None:
    rows = [row(1, [5.0], [None]), row(2, [None, 4.0], [None, None])]
    final = result("finetune", rows, COST)["final"]
    assert final["lost_tasks"] == [1]
    assert final["forgetting"] is None and final["forgetting_accuracy"] is None


def test_what_cannot_be_compared_or_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="one evaluator"):
        result("finetune", [row(1, [5.0], [0.9]), row(2, [5.0, 5.0], [0.9, 0.9], evaluator="other")], COST)
    with pytest.raises(AssertionError, match="starved_seconds"):
        result("finetune", ROWS, {key: 0.0 for key in COST if key != "starved_seconds"})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"fd": float("nan")})
    assert not (tmp_path / "metrics.json").exists()
