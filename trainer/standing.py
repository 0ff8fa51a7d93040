"""How far a run has come, read from its directory alone. Imports nothing heavy: schedulers' scripts ask for it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.config import Config
from trainer.run import RunDir

STEP_PREFIX = "step-"


@dataclass(frozen=True)
class Standing:
    """Differs from the one before wherever a start of the run has left something that the next one need not do again.

    `task` and `step` are those of the newest checkpoint, 0 where there is none; `results` counts the models, measures
    and the like that the tasks have left so far.
    """

    finished: bool
    task: int
    step: int
    results: int

    def __str__(self) -> str:
        return f"task {self.task}, step {self.step}, {self.results} results"


def standing(config: Config, run: RunDir) -> Standing:
    """Where the run of a configuration stands."""
    tasks = range(1, len(config.data.tasks) + 1)
    task, step = max(((task, step) for task in tasks for step in checkpoint_steps(run, task)), default=(0, 0))
    results = sum(path.exists() for task in tasks for path in _results(run, task))
    return Standing(finished_result(run, config) is not None, task, step, results)


def finished_result(run: RunDir, config: Config) -> dict[str, Any] | None:
    """The result of a run that has learnt every task of the configuration, with the classifier asked for, else None."""
    try:
        content = json.loads(run.metrics.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(content, dict) or not isinstance(final := content.get("final"), dict):
        return None
    complete = content.get("tasks") == len(config.data.tasks) and final.get("classifier") == asked_for(config)
    return content if complete else None


def asked_for(config: Config) -> dict[str, Any] | None:
    """What a result says of the classifier of a configuration; None for one without."""
    return asdict(config.classifier) if config.classifier.epochs else None


def checkpoint_steps(run: RunDir, task: int) -> list[int]:
    """Steps of a task's published checkpoints, ascending."""
    names = [path.name.removeprefix(STEP_PREFIX) for path in run.checkpoints(task).glob(f"{STEP_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def _results(run: RunDir, task: int) -> list[Path]:
    """What a task leaves, each published at once."""
    directories = (run.local_teacher(task), run.teacher(task), run.fisher(task), run.classifier(task))
    return [*(directory / "card.json" for directory in directories), run.evaluation(task)]
