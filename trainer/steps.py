"""Arithmetic of steps, and the pieces of a step that know nothing of a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.config import Config, LocalStart, MethodName
from trainer.data.batch import Examples, JointExamples
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.models.teacher import load_teacher
from trainer.run import RunDir
from trainer.seeds import hash_key

CHECKPOINTS_PER_TASK = 4  # with checkpoint.every_images=0


@dataclass(frozen=True)
class Stage:
    """Steps [begin, end) of a task, and what they learn from: real images and, where something is replayed, beside them
    what the method rehearses. A `taught` stage is one of jdcl's teachers, whose images take the place of the task's."""

    name: str  # empty where it is the whole task
    begin: int
    end: int
    replayed: bool
    real: bool = True
    taught: bool = False

    @property
    def steps(self) -> int:
        return self.end - self.begin


def stages(config: Config, task: int) -> list[Stage]:
    """The parts of a task, one after the other: jdcl has two from the second task on, the others one."""
    steps = steps_per_task(config)
    if config.method.name is not MethodName.jdcl:
        return [Stage("", 0, steps, replayed=task > 1)]
    local, end = Stage("local", 0, steps, replayed=False), steps + replay_steps(config)
    taught = Stage("global", steps, end, replayed=True, real=config.jdcl.real_images, taught=True)
    return [local] if task == 1 else [local, taught]


def steps_per_task(config: Config) -> int:
    """Optimiser steps on the images of each task: `train.images_per_task`, rounded up to whole global batches."""
    return math.ceil(config.train.images_per_task / config.train.global_batch)


def replay_steps(config: Config) -> int:
    """Optimiser steps of each task, from the second on, that learn from replay."""
    if config.method.name is not MethodName.jdcl:
        return steps_per_task(config)
    return math.ceil((config.jdcl.global_images or config.train.images_per_task) / config.replay_batch)


def batch_of(config: Config, stage: Stage) -> int:
    """Images that a step of a stage sees: real ones, or those of teachers in their place."""
    return config.replay_batch if stage.taught else config.train.global_batch


def images_until(config: Config, task: int, step: int) -> int:
    """Images of a task that were seen after `step` of its steps."""
    parts = ((stage, min(max(step - stage.begin, 0), stage.steps)) for stage in stages(config, task))
    return sum(steps * batch_of(config, stage) for stage, steps in parts)


def images_of_task(config: Config, task: int) -> int:
    """Images that a task sees in all."""
    return images_until(config, task, stages(config, task)[-1].end)


def checkpoint_interval(config: Config) -> int:
    """Steps between two checkpoints within a task."""
    every = config.checkpoint.every_images or math.ceil(config.train.images_per_task / CHECKPOINTS_PER_TASK)
    return math.ceil(every / config.train.global_batch)


def fresh_model(config: Config, task: int = 1) -> Denoiser:
    """An untrained model: its initial weights are a function of the run's seed and the task that it shall learn."""
    which = "model" if task == 1 else f"model/{task}"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_key(f"{config.run.seed}/{which}") % 2**63)
        return build_denoiser(
            config.model,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
        )


def count_parameters(config: Config) -> int:
    """Weights of the denoiser, from its shapes alone: nothing is allocated. Raises ConfigError."""
    return sum(parameter.numel() for parameter in shapes_of_model(config).parameters())


def forward_flops(config: Config) -> int:
    """Floating point operations of one image's way through the denoiser (and its classifier), from shapes alone.

    Matrix products, convolutions and attention, a multiplication and an addition counted as two (torch's
    FlopCounterMode); what is done element by element is left out, as it is by convention.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    model, data = shapes_of_model(config), config.data
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        image = torch.empty(1, data.channels, data.image_size, data.image_size)
        zero = torch.zeros(1, dtype=torch.int64)
        if model.head is None:
            model(image, zero, zero)
        else:
            model(image, zero, zero, image.expand(1 + guesses(config), *image.shape[1:]))
    return counter.get_total_flops()


def shapes_of_model(config: Config) -> Denoiser:
    with torch.device("meta"):
        return build_denoiser(
            config.model,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
        )


def start_of(config: Config, run: RunDir, task: int, stage: Stage) -> dict[str, Tensor] | None:
    """The weights that a stage sets out from where they are not those that the model has: a whole state dict.

    jdcl's local stage learns a model of its own, the global one goes on with that of the tasks before.

    Raises:
        UserError: that model is missing or damaged.
    """
    if task == 1 or not stage.name:
        return None
    if stage.taught or config.jdcl.local_start is LocalStart.previous:
        return load_teacher(run.teacher(task - 1), "cpu")[0].state_dict()
    return fresh_model(config, task).state_dict()


def micro_batches(
    current: Examples, rehearsed: Examples | None, count: int
) -> Iterator[tuple[Examples, Examples | None]]:
    """Cut a rank's share of a step into `count` equal micro-batches, rehearsal in the same proportion."""
    if count == 1:
        yield current, rehearsed
        return
    for number in range(count):
        yield _part(current, number, count), None if rehearsed is None else _part(rehearsed, number, count)


def loads(
    config: Config, make: Callable[[int], Examples], images: int, points: int
) -> list[tuple[Examples, Examples | None]]:
    """What the steps of a run are fed, to try them out: examples, and what is rehearsed beside them (None: nothing).

    Args:
        make: examples of any content, so many of them.
        images, points: real images and replay points of a step; 0 points: nothing is rehearsed.
    """
    real = with_views(make(images), config) if config.classifies else make(images)
    if not points:
        return [(real, None)]
    if config.method.name is not MethodName.jdcl:
        return [(real, make(points))]
    return [(real, None), (with_views(make(points), config, taught=True), real if config.jdcl.real_images else None)]


def with_views(examples: Examples, config: Config, taught: bool = False) -> JointExamples:
    """Examples as a classifier within the model is fed them, their images in the place of views."""
    x, label = examples.x, examples.label
    logits = x.new_zeros((len(examples), config.max_classes)) if taught else None
    known = torch.ones_like(label, dtype=torch.bool)
    noise, weak = (examples.target, None) if taught else (None, x if guesses(config) else None)
    return JointExamples(x, examples.t, examples.target, label, x, known, weak, noise, logits)


def guesses(config: Config) -> bool:
    """Whether the classifier is asked about weak views, too (FixMatch)."""
    return config.data.labelled < 1 and config.jdcl.fixmatch_weight > 0


def replay_metrics(stats: Mapping[str, Any]) -> dict[str, float]:
    """What the log and the progress bar show of a replay source."""
    needed = stats["pool_needed"]
    return {
        "pool_ready": stats["pool_ready"],
        "pool_fill": stats["pool_ready"] / needed if needed else 1.0,
        "starved_seconds": stats["starved_seconds"],
        "teacher_evaluations": stats["teacher_evaluations"],
    }


def rejections(tasks: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the replay of all tasks: images that teachers sampled in vain, and by class the trajectories for which they
    made too few, so that others stood in."""
    lacking = Counter[str]()
    rejected = 0
    for stats in tasks:
        rejected += stats.get("rejected_images", 0)
        lacking.update(stats.get("lacking", {}))
    return {"rejected_images": rejected, "lacking": dict(sorted(lacking.items()))}


def _part(examples: Examples, number: int, count: int) -> Examples:
    size = len(examples) // count
    return examples.rows(slice(number * size, (number + 1) * size))
