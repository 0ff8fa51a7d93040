"""Measuring the model of a finished task again, by other settings, without touching the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from trainer.data.remote import local_root
from trainer.data.shards import read_card
from trainer.errors import UserError
from trainer.judge import Judge
from trainer.run import RunDir
from trainer.sampling import newest_task
from trainer.settings import config_from_run
from trainer.tracking.tracker import Tracker
from trainer.world import World


def reevaluate(root: Path, task: int, overrides: list[str], device: torch.device) -> dict[str, Any]:
    """Measures of the model after a task (0: the newest finished one), as `trainer.evaluation.evaluate` gives them.

    The classifier that a run teaches (`classifier.epochs`) is no part of the model: its accuracy is in metrics.json.

    Args:
        root: the run directory.
        overrides: a dotlist of `evaluation.*` and `run.seed` (other start noise), over the run's own settings.

    Raises:
        UserError: no such run or task, or a setting that is not of the evaluation.
    """
    run = RunDir(root)
    task = task or newest_task(run)
    foreign = [item for item in overrides if not item.startswith(("evaluation.", "run.seed="))]
    if foreign:
        raise UserError(f"command line: {foreign[0]}: only evaluation.* and run.seed may be set here")
    config = config_from_run(run.config, overrides)
    if task > len(config.data.tasks):
        raise UserError(f"--task {task}: {run.config} has {len(config.data.tasks)} tasks")
    judge = Judge(config, run, World(0, 1, 0, device), Tracker(), read_card(local_root(config.data)).classes)
    return judge.measure(task)
