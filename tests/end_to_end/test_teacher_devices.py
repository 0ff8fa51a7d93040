"""Rates measured by the real programs: a trial on this machine, and a run that was trained here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .conftest import TASKS, Workplace

PLAN = ("--config", "tiny.yaml", "--num_gpus", "1", "--json", TASKS)


def planned(workplace: Workplace, *arguments: str) -> dict[str, Any]:
    code, output = workplace.tool("plan.py", *PLAN, *arguments)
    assert code == 0, output
    return json.loads(output[output.index("{\n") :])  # DeepSpeed may have warned on stderr


def check(content: dict[str, Any]) -> None:
    """Positive rates, and devices that follow from them: 3 + 4 evaluations make 4 points, one beside each image."""
    rates = content["rates"]
    assert all(rates[key] > 0 for key in rates) and len(rates) == 3
    ratio = rates["images_per_second"] * 7 / 4 / rates["evaluations_per_second"]
    assert content["teacher_devices_per_trainer_device"] == pytest.approx(ratio)
    assert content["teacher_devices_needed"] >= ratio


def test_rates_measured_here(workplace: Workplace) -> None:
    content = planned(workplace, "--measure", "run.name=only-planned")
    check(content)
    assert "16 real images with 16 replay points" in content["source"] and "CPU, 1 thread" in content["source"]
    assert not (workplace.path / "runs" / "only-planned").exists()


def test_inline_replay_measured_here(workplace: Workplace) -> None:
    content = planned(workplace, "--measure", "replay.placement=inline", "train.micro_batch=auto")
    rates = content["rates"]
    expected = 1 + 4 * rates["images_per_second"] / rates["evaluations_per_second"]
    assert content["inline_step_factor"] == pytest.approx(expected) and content["teacher_devices_needed"] is None


def test_rates_of_a_run_that_was_trained(workplace: Workplace) -> None:
    code, output = workplace.run("run.name=rated", TASKS)
    assert code == 0, output
    content = planned(workplace, "--rates", "runs/rated")
    check(content)
    assert "1 x CPU, 1 thread" in content["source"]
    code, output = workplace.tool("plan.py", *PLAN, "--rates", "runs/rated", "model.channels=[8,16]")
    assert code == 2 and output.startswith("error: ") and "model.channels" in output and output.count("\n") == 1
