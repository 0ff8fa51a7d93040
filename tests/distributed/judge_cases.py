"""Judging models that were never trained: what the evaluation needs of a run directory, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trainer.config import Config, Verify
from trainer.data.buffer import choose, save_buffer
from trainer.data.dataset import TaskData
from trainer.data.shards import read_card
from trainer.judge import Judge
from trainer.models.teacher import save_teacher
from trainer.preflight import prepare_data
from trainer.run import RunDir
from trainer.settings import load_config
from trainer.steps import fresh_model
from trainer.tracking.tracker import Tracker
from trainer.world import World

SETTINGS = [
    "data.tasks=[[0,1],[2,3]]",
    "model.channels=[8,8]",
    "model.norm_groups=4",
    "method.name=experience_replay",
    "method.buffer_per_class=5",
    "evaluation.samples=64",
    "evaluation.steps=3",
    "evaluation.batch=50",
    "evaluation.classifier_epochs=1",
    "evaluation.grid_per_class=2",
]
COST = {
    "train_seconds": 1.0,
    "teacher_evaluations": 0,
    "replay_points_used": 0,
    "starved_seconds": 0.0,
    "images_per_second": 1.0,
}


def judge(world: World, root: str, name: str, settings: list[str]) -> dict[str, Any]:
    """metrics.json of two tasks, on the main rank; {} on the others."""
    config = load_config("digits", [f"data.root={root}/data", *SETTINGS, *settings])
    run = RunDir(Path(root) / name)
    world.on_main(lambda: publish(config, run))
    return open_judge(config, run, world).finish(lambda: {"cost": dict(COST)})


def open_judge(config: Config, run: RunDir, world: World) -> Judge:
    return Judge(config, run, world, Tracker(), read_card(Path(config.data.root)).classes)


def publish(config: Config, run: RunDir) -> None:
    """Data, and for each task a model with fresh weights and a buffer."""
    prepare_data(config, progress=False)
    weights = {key: value.detach().clone() for key, value in fresh_model(config).state_dict().items()}
    for task in (1, 2):
        save_teacher(
            run.teacher(task),
            {key: value * (0.5 + 0.25 * task) for key, value in weights.items()},
            task=task,
            classes=config.classes_until(task),
            model=config.model,
            diffusion=config.diffusion,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
            class_names=[str(label) for label in range(10)],
        )
        data = TaskData.open(Path(config.data.root), "train", [task], Verify.size)
        save_buffer(data, choose(data, config.method, config.run.seed, task), run.buffer(task))
