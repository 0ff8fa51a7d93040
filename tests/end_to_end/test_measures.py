"""What a run tells of its own speed and memory, and what it keeps of what it compiled."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from .conftest import TASKS, Workplace


def train(workplace: Workplace, name: str, *arguments: str, timeout: float = 150) -> str:
    """What a run printed that succeeded."""
    code, output = workplace.run(f"run.name={name}", TASKS, "method.name=finetune", *arguments, timeout=timeout)
    assert code == 0, output
    return output


def train_lines(workplace: Workplace, name: str) -> list[dict[str, Any]]:
    lines = (workplace.path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "train"]


def test_measures_and_a_profile_of_a_run(workplace: Workplace) -> None:
    train(workplace, "plain", "train.micro_batch=16")
    output = train(
        workplace,
        "measured",
        *("train.micro_batch=auto", "train.peak_tflops=0.5"),
        *("tracking.profile_steps=2", "tracking.profile_start=4"),
    )
    assert "train.micro_batch=auto: 16 of a rank's 16 images at once (a CPU takes them all)" in output
    trace = Path("runs/measured/logs/attempt-1/profile-rank-0.json.gz")
    assert f"profiled steps 4 to 5 of this attempt (from 0): {trace}" in output
    assert "traceEvents" in json.loads(gzip.decompress((workplace.path / trace).read_bytes()))
    assert "MFU" in output and " GB" in output
    assert workplace.teacher_id("measured", 2) == workplace.teacher_id("plain", 2)
    cost, rates = workplace.metrics("measured")["cost"], train_lines(workplace, "measured")
    for line in rates:
        assert line["mfu"] == pytest.approx(line["model_tflops"] / 0.5)
        assert line["images_per_second"] > 0 and line["data_wait_seconds"] >= 0 and line["replay_wait_seconds"] == 0
    assert 0 < cost["mfu"] == pytest.approx(cost["model_tflops"] / 0.5)
    assert cost["peak_memory_gb"] == max(line["peak_memory_gb"] for line in rates) > 0.1
    assert cost["data_wait_seconds"] == pytest.approx(sum(line["data_wait_seconds"] for line in rates))
    assert workplace.metrics("plain")["cost"]["mfu"] is None


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="without a C++ compiler nothing is compiled for the CPU")
def test_a_run_finds_what_another_start_compiled(workplace: Workplace) -> None:
    """With an own cache, then with that one's: the same weights, and no graph is compiled anew."""
    name, settings = "compiled", ("train.compile=true", "train.activation_checkpointing=true")
    train(workplace, name, *settings, timeout=1000)
    cache = workplace.path / "runs" / name / "compile_cache"
    kept = compiled(cache)
    assert kept
    train(workplace, f"{name}-again", *settings, f"train.compile_cache={cache}")
    assert compiled(cache) == kept
    assert not (workplace.path / "runs" / f"{name}-again" / "compile_cache").exists()
    assert workplace.teacher_id(f"{name}-again", 2) == workplace.teacher_id(name, 2)


def compiled(cache: Path) -> set[str]:
    """Graphs and machine code in a cache."""
    return {
        os.path.relpath(path, cache) for path in cache.rglob("*") if path.suffix == ".so" or "fxgraph" in path.parts
    }
