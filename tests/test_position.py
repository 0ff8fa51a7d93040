"""Which checkpoint a run goes on from, and which are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.checkpoint import write_checkpoint
from trainer.errors import UserError
from trainer.position import Position, checkpoint_path, checkpoints, prune_checkpoints, set_aside, sound_checkpoint
from trainer.run import RunDir


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """Task 1 learnt, two checkpoints of task 2, and what else may lie beside them."""
    run = RunDir(tmp_path)
    for place in [(1, 8), (2, 4), (2, 12)]:
        publish(run, *place)
    for name in (".step-00000016.77.tmp", "damaged-step-00000014", "step-x"):
        (run.checkpoints(2) / name).mkdir()
    return run


def publish(run: RunDir, task: int, step: int) -> Path:
    pieces = {name: {"a": torch.ones(4)} for name in ("weights", "exp_avg")}
    return write_checkpoint(checkpoint_path(run, task, step), pieces, {})


def damage(run: RunDir, task: int, step: int) -> None:
    path = checkpoint_path(run, task, step) / "exp_avg.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_checkpoints_are_listed_newest_first(run: RunDir) -> None:
    assert checkpoints(run, 3) == [(2, 12), (2, 4), (1, 8)]
    assert checkpoints(run, 1) == [(1, 8)]


def test_the_newest_is_taken_where_it_is_sound(run: RunDir) -> None:
    assert sound_checkpoint(run, 3) == (2, 12, [])


def test_damaged_ones_are_named_and_set_aside(run: RunDir) -> None:
    damage(run, 2, 12)
    (checkpoint_path(run, 2, 4) / "state.json").write_text("{")
    task, step, complaints = sound_checkpoint(run, 3)
    assert (task, step) == (1, 8)
    assert "step-00000012/exp_avg.safetensors: damaged" in complaints[0]
    assert "step-00000004/state.json: unreadable" in complaints[1]
    assert checkpoints(run, 3) == [(1, 8)]
    assert (run.checkpoints(2) / "damaged-step-00000012" / "exp_avg.safetensors").exists()
    assert sound_checkpoint(run, 3) == (1, 8, []), "told once"


def test_nothing_sound_is_the_beginning(run: RunDir) -> None:
    for place in checkpoints(run, 2):
        damage(run, *place)
    task, step, complaints = sound_checkpoint(run, 2)
    assert (task, step, len(complaints)) == (0, 0, 3)


def test_another_format_ends_the_search(run: RunDir) -> None:
    path = checkpoint_path(run, 2, 12) / "state.json"
    path.write_text('{"format": 1}')
    with pytest.raises(UserError, match="not a checkpoint of format"):
        sound_checkpoint(run, 2)
    assert path.exists()


def test_a_checkpoint_can_be_set_aside_twice(run: RunDir) -> None:
    aside = set_aside(checkpoint_path(run, 2, 12))
    publish(run, 2, 12)
    assert set_aside(checkpoint_path(run, 2, 12)) == aside
    assert aside.name == "damaged-step-00000012"


def test_a_running_task_keeps_its_newest_and_earlier_ones_their_last(run: RunDir) -> None:
    publish(run, 1, 4)
    publish(run, 2, 13)
    prune_checkpoints(run, 2, keep=2)
    assert checkpoints(run, 2) == [(2, 13), (2, 12), (1, 8)]
    assert (run.checkpoints(2) / "damaged-step-00000014").exists()
    publish(run, 2, 14)
    prune_checkpoints(run, 2, keep=2)
    assert sorted(path.name for path in run.checkpoints(2).iterdir()) == [
        ".step-00000016.77.tmp",
        "step-00000013",
        "step-00000014",
        "step-x",
    ]


def test_two_are_left_when_a_task_ends_until_the_next_has_one(run: RunDir) -> None:
    publish(run, 3, 1)
    prune_checkpoints(run, 2, keep=2)
    assert checkpoints(run, 2) == [(2, 12), (2, 4), (1, 8)]
    prune_checkpoints(run, 3, keep=2)
    assert checkpoints(run, 3) == [(3, 1), (2, 12), (1, 8)]


def test_a_position_survives_a_checkpoint() -> None:
    position = Position(task=2, step=3, teacher_id="x", replay={"2": {"points_used": 5}})
    assert Position.from_extra(position.as_extra()) == position
    with pytest.raises(UserError, match="another version"):
        Position.from_extra(position.as_extra() | {"epoch": 1})
