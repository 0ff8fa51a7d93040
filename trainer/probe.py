"""What the model of a task is asked for its evaluation, shared by all ranks: samples, and answers to real images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Config
from trainer.data.dataset import TaskData
from trainer.data.remote import open_tasks
from trainer.diffusion.likelihood import Posterior, timestep_strata
from trainer.diffusion.schedules import NoiseSchedule
from trainer.evaluation.continual_classifier import accuracy_row, classify
from trainer.evaluation.evaluate import Evaluator, Samples
from trainer.evaluation.generate import Sampling, balanced_count, generate, share_indices
from trainer.evaluation.real_images import (
    Measured,
    RealImages,
    bin_losses,
    bound_row,
    bound_terms,
    loss_row,
    smallest_seeds,
)
from trainer.evaluation.representation import Encode, Represented, features_at, probe_choice
from trainer.models.denoiser import Denoiser
from trainer.models.teacher import load_teacher
from trainer.run import RunDir
from trainer.stop import Stopped
from trainer.world import World


@dataclass(frozen=True)
class Answers:
    """Samples as the judges see them, and the rows of what was made of real images.

    `represented`: features of training and of test images, for probes; None where there are none.
    """

    samples: Samples
    rows: list[dict[str, Any]]
    represented: tuple[Represented, Represented] | None = None


@dataclass(frozen=True)
class Probe:
    """Puts the models of a run to the test; every method is a collective."""

    config: Config
    run: RunDir
    world: World
    interrupting: Callable[[], AbstractContextManager[None]]

    def ask(self, task: int, evaluator: Evaluator) -> Answers:
        """All that the evaluation of the model learnt up to `task` needs of it, the same on every rank."""
        model, schedule, card = load_teacher(self.run.teacher(task), self.world.device)
        images, asked = self._samples(model, schedule, task, self.config.evaluation.samples, "evaluation")
        measured = Measured(
            model,
            schedule,
            Posterior.of(card.diffusion_config).to(self.world.device),
            seed=self.config.run.seed,
            batch=self.config.evaluation.batch,
            device=self.world.device,
        )
        rows = [*self._losses(measured, task), *self._bound(measured, task), *self._classified(model, task)]
        return Answers(self._seen(evaluator, images, asked), rows, self._represented(measured, model.features, task))

    def replayed(self, task: int, count: int) -> NDArray[np.uint8]:
        """Images (n, C, H, W), n >= `count`, of the model learnt up to `task`, as many of each of its classes; the same
        on every rank. Sampled as for an evaluation, but from other noise."""
        model, schedule, _ = load_teacher(self.run.teacher(task), self.world.device)
        return self._samples(model, schedule, task, count, "classifier")[0]

    def _samples(
        self, model: Denoiser, schedule: NoiseSchedule, task: int, count: int, purpose: str
    ) -> tuple[NDArray[np.uint8], NDArray[np.int64] | None]:
        config, classes = self.config, self.config.classes_until(task)
        sampling = Sampling(
            seed=config.run.seed,
            draw=task,
            shape=(config.data.channels, config.data.image_size, config.data.image_size),
            steps=config.evaluation.steps,
            solver=config.evaluation.solver,
            eta=config.evaluation.eta,
            guidance=config.evaluation.guidance,
            batch=config.evaluation.batch,
            purpose=purpose,
        )

        def work(indices: NDArray[np.int64]) -> list[Tensor]:
            images, asked = generate(model, schedule, classes, indices, sampling, self.world.device)
            return [images] if asked is None else [images, asked]

        images, *asked = self._shared(balanced_count(count, len(classes)), work)
        return images, asked[0] if asked else None

    def _seen(self, evaluator: Evaluator, images: NDArray[np.uint8], asked: NDArray[np.int64] | None) -> Samples:
        """Samples as the judges see them: a large extractor takes as long over them as the model took to make them."""

        def work(indices: NDArray[np.int64]) -> list[Tensor]:
            mine = evaluator.look(images[indices % len(images)], None)
            return [torch.from_numpy(mine.predicted), torch.from_numpy(mine.features)]

        predicted, features = self._shared(len(images), work)
        return Samples(images, asked, predicted, features)

    def _losses(self, measured: Measured, task: int) -> list[dict[str, Any]]:
        """Of the tasks learnt, and of the next one before it is."""
        bins = self.config.evaluation.timestep_bins
        data, tasks = self._real(min(task + 1, len(self.config.data.tasks)), self.config.evaluation.loss_images)
        if data is None:
            return []
        (losses,) = self._shared(len(data), lambda rows: [bin_losses(measured, read(data, tasks, rows), bins)])
        return [loss_row(losses, tasks, task)]

    def _bound(self, measured: Measured, task: int) -> list[dict[str, Any]]:
        count = self.config.evaluation.bpd_timesteps
        data, tasks = self._real(task, self.config.evaluation.bpd_images)
        if data is None:
            return []
        (terms,) = self._shared(len(data), lambda rows: [bound_terms(measured, read(data, tasks, rows), count)])
        return [bound_row(terms, tasks, task, timestep_strata(measured.schedule.timesteps, count).tolist())]

    def _classified(self, model: Denoiser, task: int) -> list[dict[str, Any]]:
        """What the model's own classifier, where it has one, makes of all test images of the tasks learnt."""
        if model.head is None:
            return []
        data, tasks = _joined([self._images("test", [number]) for number in range(1, task + 1)])
        classes, batch = self.config.classes_until(task), self.config.evaluation.batch

        def logits(view: Tensor) -> Tensor:
            return model.classify(view)[:, classes]

        def work(rows: NDArray[np.int64]) -> list[Tensor]:
            parts = [rows[start : start + batch] % len(data) for start in range(0, len(rows), batch)]
            told = [classify(logits, classes, data.read(part), self.world.device) for part in parts]
            return [torch.from_numpy(np.concatenate(told))]

        (predicted,) = self._shared(len(data), work)
        return [accuracy_row(predicted, data.labels, tasks, "model")]

    def _represented(self, measured: Measured, encode: Encode, task: int) -> tuple[Represented, Represented] | None:
        """Features of as many images of each class learnt, of the training and of the test split."""
        chosen = self.config.evaluation
        if not chosen.probe_images:
            return None
        found: list[Represented] = []
        for split in ("train", "test"):
            data = self._images(split, list(range(1, task + 1)))
            data = data.subset(probe_choice(data.keys, data.labels, chosen.probe_images, self.config.run.seed))
            nothing = np.zeros(len(data), dtype=np.int64)  # of which task an image is does not matter

            def work(
                rows: NDArray[np.int64], data: TaskData = data, tasks: NDArray[np.int64] = nothing
            ) -> list[Tensor]:
                return [features_at(measured, encode, read(data, tasks, rows), chosen.probe_timesteps)]

            found.append(Represented(self._shared(len(data), work)[0], data.labels))
        return found[0], found[1]

    def _real(self, last: int, count: int) -> tuple[TaskData | None, NDArray[np.int64]]:
        """The same `count` test images of each task up to `last`, and the task of each; None for no images."""
        if not count:
            return None, np.empty(0, dtype=np.int64)
        parts = [self._images("test", [task]) for task in range(1, last + 1)]
        return _joined([part.subset(smallest_seeds(part.keys, count, self.config.run.seed)) for part in parts])

    def _images(self, split: str, tasks: list[int]) -> TaskData:
        return open_tasks(self.config.data, split, tasks)

    def _shared(self, count: int, work: Callable[[NDArray[np.int64]], Sequence[Tensor]]) -> list[NDArray[Any]]:
        """The tensors (count, ...) that `work` gives of all indices, each rank doing its part of them.

        Raises:
            Stopped: on every rank, when one was stopped.
        """
        indices = share_indices(count, self.world.rank, self.world.size)
        stopped: Stopped | None = None
        parts: Sequence[Tensor] = ()
        try:
            with self.interrupting():
                parts = work(indices)
        except Stopped as error:
            stopped = error
        if self.world.any(stopped is not None):
            raise stopped or Stopped("another rank was stopped")
        return [self.world.all_gather(part.to(self.world.device)).cpu()[:count].numpy() for part in parts]


def _joined(parts: list[TaskData]) -> tuple[TaskData, NDArray[np.int64]]:
    """The images of tasks 1, 2, ... one after another, and the task of each."""
    tasks = np.repeat(np.arange(1, len(parts) + 1), [len(part) for part in parts])
    return TaskData.concat(parts), tasks.astype(np.int64)


def read(data: TaskData, tasks: NDArray[np.int64], rows: NDArray[np.int64]) -> RealImages:
    """Images of a data set; rows past its end, of a rank whose share runs over, are taken from its beginning."""
    rows = rows % len(data)
    return RealImages(data.read(rows), data.labels[rows], data.keys[rows], tasks[rows])
