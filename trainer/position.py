"""Where a run stands, and the checkpoints that remember it."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint import CheckpointReader, DamagedCheckpoint
from trainer.errors import UserError
from trainer.run import RunDir
from trainer.standing import STEP_PREFIX, checkpoint_steps

DAMAGED_PREFIX = "damaged-"


def no_cost() -> dict[str, float]:
    """Seconds, and what else is summed up over all attempts; see `trainer.performance`."""
    seconds = dict.fromkeys(("train_seconds", "wall_seconds", "data_wait_seconds"), 0.0)
    return seconds | {"model_tflop": 0.0, "peak_memory_gb": 0.0}


@dataclass
class Position:
    """`step` steps of task `task` are done. Travels in the checkpoint, with what else a restart must know."""

    task: int = 1
    step: int = 0
    teacher_id: str = ""  # of the teacher that this task is learnt with
    cost: dict[str, float] = field(default_factory=no_cost)
    replay: dict[str, dict[str, Any]] = field(default_factory=dict)  # counters of the replay source, by task

    def next_task(self) -> Position:
        """The start of the task after this one."""
        return Position(task=self.task + 1, cost=self.cost, replay=self.replay)

    def as_extra(self) -> dict[str, Any]:
        """As a checkpoint keeps it."""
        return asdict(self)

    @classmethod
    def from_extra(cls, extra: dict[str, Any]) -> Position:
        """The inverse of `as_extra`. Raises UserError for what another version of this program kept."""
        if extra.keys() != cls.__dataclass_fields__.keys():
            raise UserError("the checkpoint was written by another version of this program; take another run.name")
        return cls(**extra | {"cost": no_cost() | extra["cost"]})


def checkpoint_path(run: RunDir, task: int, step: int) -> Path:
    """`tasks/<k>/checkpoints/step-<s>`; a directory of this name is complete, since it is published by renaming."""
    return run.checkpoints(task) / f"{STEP_PREFIX}{step:08d}"


def parse_checkpoint(path: Path) -> tuple[int, int]:
    """Task and step of a checkpoint's directory."""
    return int(path.parent.parent.name), int(path.name.removeprefix(STEP_PREFIX))


def checkpoints(run: RunDir, tasks: int) -> list[tuple[int, int]]:
    """Task and step of every published checkpoint, newest first."""
    found = list[tuple[int, int]]()
    for task in range(tasks, 0, -1):
        found += [(task, step) for step in reversed(checkpoint_steps(run, task))]
    return found


def sound_checkpoint(run: RunDir, tasks: int) -> tuple[int, int, list[str]]:
    """Task and step of the newest checkpoint that is what was written, after a look at every byte of it.

    (0, 0) where there is none. With it, one line for each newer one that is damaged; those are set aside (see
    `set_aside`), so that the run goes on from the one before and they are not chosen again.

    Raises:
        UserError: a checkpoint that cannot be read, or is of another format, without being damaged.
    """
    complaints = list[str]()
    for task, step in checkpoints(run, tasks):
        path = checkpoint_path(run, task, step)
        try:
            CheckpointReader(path).verify()
        except DamagedCheckpoint as damage:
            complaints.append(f"{damage}; set aside as {set_aside(path).name}")
            continue
        return task, step, complaints
    return 0, 0, complaints


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint to `damaged-step-<s>`: to be looked at until the run has come as far again."""
    aside = path.with_name(f"{DAMAGED_PREFIX}{path.name}")
    if aside.exists():
        shutil.rmtree(aside)
    return path.rename(aside)


def prune_checkpoints(run: RunDir, task: int, keep: int) -> None:
    """Delete what the policy does not keep while `task` runs: all but its newest `keep`, of earlier tasks the last.

    So with `keep` of 2 or more there are two to fall back on from the second checkpoint of a run on.
    """
    for earlier in range(1, task):
        _keep_newest(run, earlier, 1)
    _keep_newest(run, task, keep)


def _keep_newest(run: RunDir, task: int, keep: int) -> None:
    steps = checkpoint_steps(run, task)
    for step in steps[:-keep]:
        _delete(checkpoint_path(run, task, step))
    for path in run.checkpoints(task).glob(f"{DAMAGED_PREFIX}{STEP_PREFIX}*"):
        if steps and path.name.removeprefix(DAMAGED_PREFIX) <= checkpoint_path(run, task, steps[-1]).name:
            _delete(path)


def _delete(path: Path) -> None:
    """Under a name that a new start sweeps away, so that a half-deleted directory is never taken for a whole one.

    What cannot be deleted now (a network file system keeps what somebody reads) is left to that.
    """
    with suppress(OSError):
        shutil.rmtree(path.rename(path.with_name(f".{path.name}.{os.getpid()}.old")))
