"""The real training loop on the ranks of a pool, with trouble at chosen steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from trainer import engine, pulse
from trainer.config import MethodName
from trainer.data.shards import read_card
from trainer.errors import UserError
from trainer.loop import Trainer
from trainer.micro_batch import largest_fitting
from trainer.models.denoiser import Denoiser
from trainer.models.teacher import read_card as read_teacher
from trainer.position import checkpoints
from trainer.preflight import prepare_data
from trainer.run import RunDir
from trainer.settings import load_config
from trainer.steps import fresh_model, steps_per_task
from trainer.stop import Stopped
from trainer.tracking.tracker import Tracker
from trainer.world import World


class NoJudge:
    """In place of the evaluation, which has tests of its own."""

    def __init__(self, names: list[str]) -> None:
        self.class_names = names

    def after(self, task: int) -> None:
        """Nothing is measured."""

    def finish(self, account: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        return account()


class Poisoned:
    """A method whose loss is not a number at some steps, on one rank."""

    def __init__(self, method: Any, hit: Callable[[], bool]) -> None:
        self._method, self._hit = method, hit

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def loss(self, *arguments: Any) -> dict[str, torch.Tensor]:
        terms = self._method.loss(*arguments)
        return terms | {"loss": terms["loss"] * torch.nan} if self._hit() else terms


class Full(torch.nn.Module):
    """A model on a device without room for more than `most` images at once."""

    def __init__(self, model: Denoiser, most: int) -> None:
        super().__init__()
        self.model, self.most = model, most

    def blocks(self) -> list[torch.nn.Module]:
        return self.model.blocks()

    def forward(self, x: torch.Tensor, *arguments: torch.Tensor) -> torch.Tensor:
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.model(x, *arguments)


def choose_and_learn(world: World, root: str, name: str, settings: list[str], most: list[int]) -> dict[str, Any]:
    """Train with the micro-batch that is found where rank r has room for most[r] images; with it, `found`."""
    config = load_config("digits", [f"data.root={root}/data", *settings, "train.micro_batch=auto"])
    config.method.name = MethodName.finetune
    found = largest_fitting(config, world, lambda config: Full(fresh_model(config), most[world.rank]))
    return learn(world, root, name, [*settings, f"train.micro_batch={found}"], []) | {"found": found}


def learn(
    world: World, root: str, name: str, settings: list[str], poisoned: list[int], stop_at: int = 1 << 30
) -> dict[str, Any]:
    """Train one task of digits in `root`, or those of the settings; how it ended and what is left of it.

    Finetunes, where the settings name no method. The last rank's loss is poisoned at steps `poisoned` (counted from 0),
    and the last rank wants to stop from step `stop_at` on, the steps of all tasks counted together.
    """
    config = load_config("digits", [f"data.root={root}/data", "data.tasks=[[0,1]]", *settings])
    if not any(setting.startswith("method.name=") for setting in settings):
        config.method.name = MethodName.finetune
    engine.PERSISTENT_NUMEL = 15  # ZeRO-3 really shards so small a model
    run = RunDir(Path(root) / name)
    world.on_main(lambda: prepare_data(config, progress=False))
    judge: Any = NoJudge(read_card(Path(config.data.root)).classes)
    last = world.rank == world.size - 1
    stop: Any = SimpleNamespace(
        wanted=lambda: last and (trainer.position.task - 1) * steps_per_task(config) + trainer.position.step >= stop_at
    )
    trainer = Trainer(config, run, world, Tracker(), judge, stop, time.monotonic())
    method: Any = Poisoned(trainer.method, lambda: last and trainer.position.step in poisoned)
    trainer.method = method
    result: dict[str, Any] = {}
    pulse.INTERVAL_SECONDS = 0.0  # these steps are so fast that the ranks would hardly meet
    try:
        result["account"] = trainer.fit()
        result["teacher"] = read_teacher(run.teacher(len(config.data.tasks))).teacher_id
    except (UserError, Stopped) as error:
        result |= {"error": type(error).__name__, "message": str(error)}
    finally:
        trainer.close()
    return result | {"checkpoints": [step for _, step in checkpoints(run, len(config.data.tasks))]}
