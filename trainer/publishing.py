"""What a learnt task leaves behind: the teacher of the next, its diffusers pipeline, the buffer of real images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from trainer.config import Config, Placement
from trainer.data.buffer import choose, save_buffer
from trainer.data.remote import open_tasks
from trainer.data.shards import INDEX_NAME
from trainer.methods import Rehearsal, build_method
from trainer.models.pipeline import export_pipeline
from trainer.models.teacher import CARD_NAME, save_teacher
from trainer.replay.pool import discard
from trainer.run import RunDir
from trainer.world import World

Weights = Callable[[], dict[str, Tensor]]  # a whole state dict, fp32 on the CPU; collective


@dataclass(frozen=True)
class Publisher:
    """Writes it on the main rank, once; every method is a collective."""

    config: Config
    run: RunDir
    world: World
    class_names: list[str]

    def task(self, task: int, weights: Weights) -> None:
        """The model as it is after a task, and what belongs to it; the pool that it was learnt from goes."""
        # The main rank alone looks: network file systems would go on telling the others that nothing is there.
        if self.world.any(self.world.is_main and not self._complete(task)):
            whole = weights()
            self.world.on_main(lambda: self._publish(task, whole))
        if self.config.needs_teacher and task > 1 and self.config.replay.placement is not Placement.inline:
            self.world.on_main(lambda: discard(self.run, task, self.config.replay.retirement))

    def local(self, task: int, weights: Weights) -> None:
        """The model of a task alone, the second teacher of jdcl's global stage."""
        directory = self.run.local_teacher(task)
        if self.world.any(self.world.is_main and not (directory / CARD_NAME).exists()):
            whole, classes = weights(), self.config.data.tasks[task - 1]
            self.world.on_main(lambda: self._save(directory, whole, task, classes))

    def _complete(self, task: int) -> bool:
        parts = [self.run.teacher(task) / CARD_NAME, self.run.pipeline(task)]
        if self._keeps_images:
            parts.append(self.run.buffer(task) / INDEX_NAME)
        return all(part.exists() for part in parts)

    @property
    def _keeps_images(self) -> bool:
        return build_method(self.config).rehearsal is Rehearsal.buffer

    def _publish(self, task: int, weights: dict[str, Tensor]) -> None:
        config = self.config
        self._save(self.run.teacher(task), weights, task, config.classes_until(task))
        export_pipeline(self.run.pipeline(task), self.run.teacher(task))
        if self._keeps_images:
            data = open_tasks(config.data, "train", [task])
            save_buffer(data, choose(data, config.method, config.run.seed, task), self.run.buffer(task))

    def _save(self, directory: Path, weights: dict[str, Tensor], task: int, classes: list[int]) -> None:
        config = self.config
        save_teacher(
            directory,
            weights,
            task=task,
            classes=classes,
            model=config.model,
            diffusion=config.diffusion,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
            class_names=self.class_names,
        )
