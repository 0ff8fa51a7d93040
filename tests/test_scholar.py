"""What a run's classifier learns from by method, and when it is learnt again."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import trainer.scholar
from tests.distributed.judge_cases import SETTINGS, publish
from trainer.config import Config
from trainer.evaluation.continual_classifier import Lesson
from trainer.probe import Probe
from trainer.run import RunDir
from trainer.scholar import CARD_NAME, WEIGHTS_NAME, Scholar
from trainer.settings import load_config
from trainer.stop import Stopped
from trainer.tracking.tracker import Tracker
from trainer.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
TAUGHT = ["method.name=generative_distillation"]
Spied = list[Lesson]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scholar")


def configured(place: Path, *settings: str) -> Config:
    return load_config("digits", [f"data.root={place}/data", *SETTINGS, "classifier.epochs=1", *settings])


def scholar(config: Config, run: RunDir) -> Scholar:
    probe = Probe(config, run, ALONE, nullcontext)
    return Scholar(config, run, ALONE, probe, Tracker(), nullcontext)


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Spied:
    """What has been learnt from since."""
    lessons = Spied()
    real: Callable[..., Any] = trainer.scholar.learn_task

    def spy(old: Any, architecture: str, lesson: Lesson, *rest: Any) -> Any:
        lessons.append(lesson)
        return real(old, architecture, lesson, *rest)

    monkeypatch.setattr(trainer.scholar, "learn_task", spy)
    return lessons


def learnt(place: Path, name: str, *settings: str) -> tuple[Config, RunDir, Scholar]:
    """Two tasks; models and buffers are made first."""
    config, run = configured(place, *settings), RunDir(place / name)
    if not run.root.exists():
        publish(config, run)
    found = scholar(config, run)
    found.learn(2)
    return config, run, found


def content(run: RunDir) -> dict[str, bytes]:
    return {f"{task}/{p.name}": p.read_bytes() for task in (1, 2) for p in sorted(run.classifier(task).iterdir())}


@pytest.mark.parametrize("name", ["generative_distillation", "generative_replay", "gaussian_distillation"])
def test_the_previous_model_replays_without_labels(place: Path, spied: Spied, name: str) -> None:
    _, _, found = learnt(place, name, f"method.name={name}", "classifier.replay_images=31")
    one, two = spied
    assert one.replay is None and two.replay is not None
    assert set(one.labels) == {0, 1} and set(two.labels) == {2, 3} and two.classes == [0, 1, 2, 3]
    assert two.replay.labels is None and two.replay.images.shape == (32, 1, 8, 8)  # as many of both classes
    assert (one.share, two.share) == (1.0, 0.5)
    (row,) = found.rows(2)
    assert [entry["task"] for entry in row["tasks"]] == [1, 2] and 0.0 <= row["classifier_accuracy"] <= 1.0


def test_as_many_are_replayed_as_the_task_has_images(place: Path, spied: Spied) -> None:
    learnt(place, "as-many", "model.conditional=false", *TAUGHT)
    two = spied[1]
    assert two.replay is not None and 0 <= len(two.replay.images) - len(two.images) <= 1


def test_a_buffer_is_replayed_with_its_labels(place: Path, spied: Spied) -> None:
    learnt(place, "buffer")
    two = spied[1]
    assert two.replay is not None and two.replay.labels is not None
    assert sorted(two.replay.labels) == [0] * 5 + [1] * 5 and len(two.replay.images) == 10
    assert set(two.labels) == {2, 3}


def test_all_tasks_at_once_or_the_new_one_alone(place: Path, spied: Spied) -> None:
    learnt(place, "joint", "method.name=joint")
    learnt(place, "finetune", "method.name=finetune")
    joint, alone = spied[1], spied[3]
    assert joint.replay is None and alone.replay is None
    assert set(joint.labels) == {0, 1, 2, 3} and set(alone.labels) == {2, 3}
    assert np.array_equal(joint.images[-len(alone.images) :], alone.images)


def test_nothing_is_learnt_twice_and_what_is_lost_is_made_again(place: Path, spied: Spied) -> None:
    """As after a `kill -9` between two files, or with damaged ones."""
    config, run, found = learnt(place, "again", *TAUGHT)
    before, rows = content(run), found.rows(2)
    assert set(before) == {f"{task}/{name}" for task in (1, 2) for name in (WEIGHTS_NAME, CARD_NAME)}
    again = scholar(config, run)
    again.learn(2)
    assert len(spied) == 2 and again.rows(2) == rows
    (run.classifier(2) / CARD_NAME).unlink()
    scholar(config, run).learn(2)
    assert len(spied) == 3 and content(run) == before
    weights = run.classifier(1) / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:-1])
    scholar(config, run).learn(2)
    assert len(spied) == 4 and content(run) == before, "the one after it is as it would be made"


@pytest.mark.parametrize("card", [b"", b"[]", b"{}", b"[" * 10**5, b"\xff", b'{"sha256": 1}', b'{"sha256": "SHA"}'])
def test_a_card_that_is_none_is_made_again(place: Path, spied: Spied, card: bytes) -> None:
    config, run, _ = learnt(place, "cards", *TAUGHT)
    before, spied[:] = content(run), []
    sha256 = json.loads(before[f"1/{CARD_NAME}"])["sha256"].encode()
    (run.classifier(1) / CARD_NAME).write_bytes(card.replace(b"SHA", sha256))
    scholar(config, run).learn(2)
    assert len(spied) == 1 and content(run) == before


@pytest.mark.parametrize(
    ("setting", "lessons"),
    [
        ("classifier.lr=1e-3", 2),
        ("classifier.temperature=3", 1),  # nothing is replayed with the first task
        ("classifier.replay_images=20", 1),
        ("evaluation.steps=2", 1),
        ("evaluation.samples=70", 0),
        ("data.tasks=[[0,1],[2,3],[4,5]]", 0),
    ],
)
def test_other_settings_are_learnt_by_in_order(place: Path, spied: Spied, setting: str, lessons: int) -> None:
    _, run, _ = learnt(place, f"other-{setting.partition('=')[0]}", *TAUGHT)
    spied[:] = []
    scholar(configured(place, *TAUGHT, setting), run).learn(2)
    assert [set(lesson.labels) for lesson in spied] == [{0, 1}, {2, 3}][2 - lessons :]


def test_another_teacher_is_learnt_from_again(place: Path, spied: Spied) -> None:
    config, run, _ = learnt(place, "teacher", *TAUGHT)
    other = RunDir(place / "other-teacher")
    publish(configured(place, *TAUGHT, "run.seed=1"), other)
    for name in ("model.safetensors", CARD_NAME):
        (run.teacher(1) / name).write_bytes((other.teacher(1) / name).read_bytes())
    spied[:] = []
    scholar(config, run).learn(2)
    assert [set(lesson.labels) for lesson in spied] == [{2, 3}]


def test_without_epochs_there_is_no_classifier(place: Path, spied: Spied) -> None:
    config, run = configured(place, "classifier.epochs=0", *TAUGHT), RunDir(place / "none")
    found = scholar(config, run)
    found.learn(2)
    assert found.rows(2) == [] and not spied and not run.root.exists()


def test_stopping_leaves_nothing_half_done(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = configured(place, *TAUGHT), RunDir(place / "stopped")
    publish(config, run)

    def stopped(*_: Any) -> None:
        raise Stopped("told to")

    monkeypatch.setattr(trainer.scholar, "learn_task", stopped)
    with pytest.raises(Stopped):
        scholar(config, run).learn(2)
    assert not run.classifier(1).exists()
