"""The program itself as a contender: its engine alone, and its whole training loop on real shards and a real pool."""

from __future__ import annotations

import gc
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import mse_loss

from speed.peers import move
from speed.plain import BATCHES
from speed.reference import LOSS_ERROR, compare, denoising_loss, exact
from speed.sizes import Sizes, make_config, random_examples
from speed.turns import Turns
from trainer.config import Config, Placement
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.engine import Engine
from trainer.kernels.philox import normal, timesteps, uniform
from trainer.loop import Trainer
from trainer.replay.source import ReplaySource
from trainer.run import RunDir
from trainer.seeds import derive
from trainer.steps import fresh_model
from trainer.tracking.log import MetricsLog
from trainer.tracking.tracker import Tracker
from trainer.world import join_world


def engine_training(turns: Turns, *, sizes: Sizes, directory: Path, seed: int, stage: int, compiled: bool) -> None:
    """A contender: the engine's step on ready examples, as `plain_training` takes it."""
    config = make_config(sizes, directory, f"zero-{stage}", zero={"stage": stage}, train={"compile": compiled})
    world = join_world(0, config.train.threads)
    engine = Engine(fresh_model(config), config, world)
    batches = random_examples(sizes, BATCHES, seed, world, engine.dtype)
    mark_sections(engine, turns)
    turns.start()
    while True:
        for x, t, label, target in batches:
            loss = mse_loss(engine.model(x, t, label).float(), target.float())
            engine.backward(loss)
            engine.step()
            turns.marks("rest")
            turns.note(loss, engine.grad_norm)
            turns.step_done()


def mark_sections(engine: Engine, turns: Turns) -> None:
    """Have the engine's calls begin the sections of a step."""
    for name, section in (("model", "forward"), ("backward", "backward"), ("step", "optimizer")):
        call = getattr(engine, name)

        def marked(*arguments: Any, call: Any = call, section: str = section) -> Any:
            turns.marks(section)
            return call(*arguments)

        setattr(engine, name, marked)


class TimedTrainer(Trainer):
    """The program's trainer, which takes a step when it is its turn."""

    def __init__(self, config: Config, run: RunDir, turns: Turns) -> None:
        world = join_world(0, config.train.threads)
        judge: Any = SimpleNamespace(class_names=[str(label) for label in range(config.data.classes)])
        stop: Any = SimpleNamespace(wanted=lambda: False)
        tracker = Tracker(MetricsLog(run.metrics_log))
        super().__init__(config, run, world, tracker, judge, stop, time.monotonic())
        self.turns = turns
        self._left = 0.0  # when the step before ended
        mark_sections(self.engine, turns)

    def step(self, task: int, step: int, batch: HostBatch | None, replay: ReplaySource | None) -> None:
        if step == 0:
            assert batch is not None, "the method learns from real images in every step"
            self.turns.facts["expected"] = expected_loss(self, batch)
            self.turns.start()
        else:
            self.turns.waited += time.perf_counter() - self._left
        self.turns.marks("prepare")
        super().step(task, step, batch, replay)
        if step == 0:
            self.turns.facts["terms"] = self.meter.fetch(self.world)
        self.turns.marks("rest")

    def after_step(self, task: int) -> None:
        super().after_step(task)
        self.turns.step_done()
        self._left = time.perf_counter()


def program_training(turns: Turns, *, sizes: Sizes, directory: Path, seed: int, mode: str) -> None:
    """A contender: the program's training loop on synthetic shards.

    Args: mode: "plain", the first task; "pool", half of each step's images from a replay pool; "inline", that half
        sampled in the loop by the teacher, as the paper does.
    """
    config = program_config(sizes, directory, seed, mode)
    run = RunDir(Path(config.run.dir) / config.run.name)
    run.root.mkdir(parents=True, exist_ok=True)
    gc.disable()  # as `trainer.session` does: the loop collects at fixed steps
    trainer = TimedTrainer(config, run, turns)
    turns.facts["parameters"] = sum(parameter.numel() for parameter in fresh_model(config).parameters())
    trainer.learn(1 if mode == "plain" else 2)
    raise AssertionError("a task is longer than what is timed")


def program_config(sizes: Sizes, directory: Path, seed: int, mode: str) -> Config:
    """Of the same number of images in each step, whatever they are."""
    batch = sizes.batch if mode == "plain" else sizes.batch // 2
    return make_config(
        sizes,
        directory,
        f"program-{mode}",
        run={"seed": seed},
        train={"global_batch": batch, "images_per_task": sizes.total_steps * batch},
        replay={"placement": Placement.inline.value} if mode == "inline" else {},
    )


@torch.no_grad()
def expected_loss(trainer: TimedTrainer, batch: HostBatch) -> float:
    """The loss of the untrained model on the real images of a first batch, from the equations alone."""
    config, device = trainer.config, trainer.world.device
    assert isinstance(trainer.prepare, Preparer), "a model without a classifier"
    purpose = trainer.prepare.purpose

    def seeds(use: str) -> torch.Tensor:
        return torch.from_numpy(derive(config.run.seed, f"{purpose}/{use}", batch.keys, batch.draws))

    images = batch.images.double() / 127.5 - 1
    flip = uniform(seeds("flip"), 1)[:, 0] < 0.5
    clean = torch.where(flip[:, None, None, None], images.flip(-1), images)
    noise = normal(seeds("noise"), tuple(images.shape[1:]))
    t = timesteps(seeds("timestep"), config.diffusion.timesteps)
    unet = move(fresh_model(config).unet, device, exact(device))
    return denoising_loss(unet, clean.to(device), noise.to(device), t.to(device), batch.labels.to(device))


def check_program(facts: dict[str, Any], target_square: float | None, precision: str) -> dict[str, float]:
    """Relative errors of a first step's losses, against `expected_loss` and, for replay, against its closed form.

    The teacher of the benchmark is the untrained student, so its stored predictions are the student's own: the loss
    on replay is rounding alone, beside their mean square `target_square`.

    Raises:
        WrongResult: more than rounding.
    """
    terms, allowed = facts["terms"], LOSS_ERROR[precision]
    errors = {"current": compare("the program's loss", [terms["current"]], [facts["expected"]], allowed)}
    if target_square is not None:
        found = [target_square + terms["replay"]]
        errors["replay"] = compare("the program's loss on replay", found, [target_square], allowed)
    return errors
