"""Forgetting of hand-made matrices, and the contract of metrics.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.forgetting import (
    average,
    backward_transfer,
    metric_matrix,
    result,
    task_forgetting,
    write_json,
)
from trainer.evaluation.rows import merged

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


def test_a_classifier_forgets_like_any_accuracy() -> None:
    values = [[0.9], [0.95, 0.8], [0.5, 0.9, 1.0]]
    rows = [
        merged(one, {"classifier_accuracy": 0.7, "tasks": [{"classifier_accuracy": value} for value in own]})
        for one, own in zip(ROWS, values, strict=True)
    ]
    content = result("finetune", rows, COST)
    assert content["matrix"]["classifier_accuracy"] == [[0.9, None, None], [0.95, 0.8, None], [0.5, 0.9, 1.0]]
    assert content["final"]["forgetting_classifier_accuracy"] == pytest.approx((0.45 - 0.1) / 2)
    assert content["after_task"][1]["classifier_accuracy"] == content["final"]["classifier_accuracy"] == 0.7
    alone = result("finetune", rows[:1], COST)
    assert alone["final"]["forgetting_classifier_accuracy"] is None and "matrix" in alone


def test_a_model_that_classifies_has_accuracy_and_backward_transfer_of_lopez_paz() -> None:
    """Equations 2 and 3: (0.5 + 0.9 + 1.0) / 3, and ((0.5 - 0.9) + (0.9 - 0.8)) / 2."""
    values = [[0.9], [0.95, 0.8], [0.5, 0.9, 1.0]]
    rows = [
        merged(one, {"model_accuracy": 0.7, "model_images": 9, "tasks": [{"model_accuracy": value} for value in own]})
        for one, own in zip(ROWS, values, strict=True)
    ]
    content = result("jdcl", rows, COST)
    final = content["final"]
    assert content["matrix"]["model_accuracy"] == [[0.9, None, None], [0.95, 0.8, None], [0.5, 0.9, 1.0]]
    assert final["average_accuracy"] == pytest.approx(0.8) and final["backward_transfer"] == pytest.approx(-0.15)
    assert final["forgetting_model_accuracy"] == pytest.approx(((0.95 - 0.5) + (0.8 - 0.9)) / 2)
    assert content["after_task"][1]["model_accuracy"] == final["model_accuracy"] == 0.7 and final["model_images"] == 9
    assert backward_transfer([[0.9, None], [None, 0.5]]) == [None]
    alone = result("jdcl", rows[:1], COST)["final"]
    assert alone["average_accuracy"] == 0.9
    assert alone["backward_transfer"] is None and alone["forgetting_model_accuracy"] is None
    assert "average_accuracy" not in result("finetune", ROWS, COST)["final"]


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


def test_losses_by_bin_floors_and_what_was_not_taken() -> None:
    """Two tasks, two bins: the loss of the first grows in the second bin alone, by 0.5."""
    first, second = row(1, [5.0], [0.9]), row(2, [9.0, 4.0], [0.95, 0.8])
    first["tasks"][0]["loss_bins"] = [0.9, 0.25]
    first["next_task"] = {"task": 2, "loss_bins": [1.0, 3.0]}
    second["tasks"][0]["loss_bins"], second["tasks"][1]["loss_bins"] = [0.9, 0.75], [0.8, 0.1]
    counts = {"samples": 40, "real_images": 30}
    for item in (first, second):
        entries = [{"task": entry["task"], "fd": 0.5, "accuracy": 0.99} for entry in item["tasks"]]
        entries = [entry | dict.fromkeys(("precision", "recall", "density", "coverage"), 0.9) for entry in entries]
        item["floor"] = {"fd": 0.25, "tasks": entries, **counts}
    content = result("finetune", [first, second], COST)
    assert content["matrix"]["loss_bins"] == [[[0.9, 0.25], None], [[0.9, 0.75], [0.8, 0.1]]]
    assert content["loss_before"] == [None, [1.0, 3.0]]
    assert content["final"]["forgetting_loss_bins"] == [[0.0, 0.5]] and content["final"]["forgetting_loss"] == 0.25
    assert content["floor"]["fd"] == [[0.5, None], [0.5, 0.5]]
    assert content["final"]["floor"] == content["after_task"][0]["floor"] == {"fd": 0.25, **counts}
    assert "next_task" not in content["after_task"][0] and "bpd" not in content["matrix"]
    second["tasks"][0]["loss_bins"] = [None, 0.75]
    assert result("finetune", [first, second], COST)["final"]["forgetting_loss_bins"] == [[None, 0.5]]


def test_rows_are_joined_task_by_task() -> None:
    joined = merged({"fd": 1.0, "tasks": [{"task": 1, "fd": 2.0}]}, {"loss": 3.0, "tasks": [{"task": 1, "loss": 4.0}]})
    assert joined == {"fd": 1.0, "loss": 3.0, "tasks": [{"task": 1, "fd": 2.0, "loss": 4.0}]}
