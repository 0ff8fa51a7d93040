"""One run over other numbers of ranks and other ZeRO stages, stopped in the middle of tasks: nothing lost or repeated.

What the steps took is read from the trace of samples; what there was to take, from the shards themselves.
"""

from __future__ import annotations

import json
import random
import signal
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from .conftest import TINY
from .endurance import SECONDS, Run

BATCH, STEPS = 16, 50  # 800 images of each task, whose training splits hold fewer than 300
SETTINGS: dict[str, Any] = TINY | {
    "train": TINY["train"] | {"images_per_task": STEPS * BATCH},
    "optimizer": {"eps": 1e-3},  # or Adam makes whole steps of the rounding in gradients near zero
    "replay": TINY["replay"] | {"placement": "external"},
    "evaluation": {"samples": 8, "steps": 1, "classifier_epochs": 1, "grid_per_class": 1},
    "checkpoint": {"every_images": 5 * BATCH},
    "tracking": {"progress": False, "seen_samples": True},
    "ema": {"decay": 0.9},
}
# Ranks, ZeRO stage, the signal that ends the attempt and the steps (over both tasks) after which it may come.
ATTEMPTS = (
    (1, 1, signal.SIGKILL, 15),
    (2, 3, signal.SIGTERM, STEPS + 10),
    (1, 2, signal.SIGKILL, STEPS + 30),
    (2, 0, None, 2 * STEPS),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, zygote: None) -> Iterator[Path]:
    """The folder of a run under changing worlds, and of its twin on one rank."""
    path = tmp_path_factory.mktemp("worlds")
    run, twin = (Run(path / name, SETTINGS, steps=STEPS, sampler=True) for name in ("changed", "twin"))
    try:
        twin.start(1)
        change(run)
        run.conclude()
        twin.conclude()
        yield path
    finally:
        run.place.close()
        twin.place.close()


def change(run: Run) -> None:
    """All attempts; the last one is left running."""
    chance = random.Random(0)
    for ranks, stage, number, steps in ATTEMPTS:
        trainers = run.start(ranks, f"zero.stage={stage}")
        if number is None:
            return
        assert run.wait_until(lambda steps=steps: run.checkpointed() >= steps), "ended before it was to be stopped"
        chance.choice(trainers.jobs).send_signal(number)
        code = trainers.wait(SECONDS)
        assert run.checkpointed() not in (STEPS, 2 * STEPS), "not in the middle of a task"
        if number == signal.SIGTERM:
            assert code == 0
            assert "the same command goes on from here" in trainers.printed()
        else:
            assert code


def shard_keys(place: Path, task: int) -> list[str]:
    """The keys of a task's training images, from the shards."""
    (root,) = (place / "changed" / "data").iterdir()
    keys: list[str] = []
    for path in sorted((root / "train" / f"task-{task:02d}").glob("*.tar")):
        with tarfile.open(path) as shard:
            keys += [name.removesuffix(".cls") for name in shard.getnames() if name.endswith(".cls")]
    return keys


def taken(place: Path, task: int) -> list[str]:
    """The keys that a task's steps took, one after another: of each step those of its last attempt, rank by rank."""
    steps: dict[int, tuple[int, dict[int, list[str]]]] = {}
    for path in (place / "changed/runs/run/logs").glob("attempt-*/seen-rank-*.jsonl"):
        attempt, rank = int(path.parent.name.split("-")[1]), int(path.stem.split("-")[2])
        for line in map(json.loads, path.read_text().splitlines()):
            if line["task"] == task:
                newest, shares = steps.get(line["step"], (0, {}))
                if attempt >= newest:
                    shares = shares if attempt == newest else {}
                    steps[line["step"]] = (attempt, shares | {rank: line["keys"]})
    assert sorted(steps) == list(range(STEPS))
    worlds = [len(steps[step][1]) for step in range(STEPS)]
    assert set(worlds) == {1, 2}, "the world did not change within the task"
    return [key for step in range(STEPS) for rank in sorted(steps[step][1]) for key in steps[step][1][rank]]


@pytest.mark.parametrize("task", [1, 2])
def test_every_epoch_holds_every_image_once(place: Path, task: int) -> None:
    keys = shard_keys(place, task)
    assert len(set(keys)) == len(keys) > 200
    sequence = taken(place, task)
    assert len(sequence) == STEPS * BATCH
    epochs = len(sequence) // len(keys)
    assert epochs >= 2
    for epoch in range(epochs):
        assert Counter(sequence[epoch * len(keys) : (epoch + 1) * len(keys)]) == Counter(keys)
    rest = Counter(sequence[epochs * len(keys) :])
    assert set(rest) <= set(keys)
    assert set(rest.values()) == {1}


def test_the_model_is_that_of_the_unchanged_world(place: Path) -> None:
    """The same sums in another order: equal but for rounding."""
    for task in (1, 2):
        path = f"runs/run/tasks/{task}/teacher/model.safetensors"
        changed, twin = load_file(place / "changed" / path), load_file(place / "twin" / path)
        assert changed.keys() == twin.keys()
        for name, tensor in changed.items():
            assert (tensor - twin[name]).abs().max() < 1e-5, name


def test_as_many_replay_points_are_used_as_in_the_unchanged_world(place: Path) -> None:
    for name in ("changed", "twin"):
        result = json.loads((place / name / "runs/run/metrics.json").read_text())
        assert result["cost"]["replay_points_used"] == STEPS * BATCH
