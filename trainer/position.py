"""Where a run stands, and the checkpoints that remember it."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.run import RunDir

STEP_PREFIX = "step-"


def no_cost() -> dict[str, float]:
    """Seconds spent so far, over all attempts."""
    return {"train_seconds": 0.0, "wall_seconds": 0.0}


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
        """The inverse of `as_extra`."""
        return cls(**extra)


def checkpoint_path(run: RunDir, task: int, step: int) -> Path:
    """`tasks/<k>/checkpoints/step-<s>`; a directory of this name is complete, since it is published by renaming."""
    return run.checkpoints(task) / f"{STEP_PREFIX}{step:08d}"


def newest_checkpoint(run: RunDir, tasks: int) -> tuple[int, int]:
    """Task and step of the latest published checkpoint of the latest task that has one; (0, 0) where none is."""
    for task in range(tasks, 0, -1):
        found = sorted(run.checkpoints(task).glob(f"{STEP_PREFIX}*"))
        if found:
            return task, int(found[-1].name.removeprefix(STEP_PREFIX))
    return 0, 0


def prune_checkpoints(run: RunDir, task: int, keep: int, last_step: int) -> None:
    """Delete what the policy does not keep: all but the newest `keep` of a task, of a finished one all but its last."""
    found = sorted(run.checkpoints(task).glob(f"{STEP_PREFIX}*"))
    done = bool(found) and found[-1] == checkpoint_path(run, task, last_step)
    for path in found[: -1 if done else -keep]:
        shutil.rmtree(path)
