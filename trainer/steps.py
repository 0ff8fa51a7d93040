"""Arithmetic of steps, and the pieces of a step that know nothing of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from trainer.config import Config
from trainer.data.batch import Examples
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.seeds import hash_key

CHECKPOINTS_PER_TASK = 4  # with checkpoint.every_images=0


def steps_per_task(config: Config) -> int:
    """Optimiser steps of each task: `train.images_per_task`, rounded up to whole global batches."""
    return math.ceil(config.train.images_per_task / config.train.global_batch)


def checkpoint_interval(config: Config) -> int:
    """Steps between two checkpoints within a task."""
    every = config.checkpoint.every_images or math.ceil(config.train.images_per_task / CHECKPOINTS_PER_TASK)
    return math.ceil(every / config.train.global_batch)


def fresh_model(config: Config) -> Denoiser:
    """The untrained model: its initial weights are a function of the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(hash_key(f"{config.run.seed}/model") % 2**63)
        return build_denoiser(
            config.model,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
        )


def count_parameters(config: Config) -> int:
    """Weights of the denoiser, from its shapes alone: nothing is allocated. Raises ConfigError."""
    return sum(parameter.numel() for parameter in _shapes_of_model(config).parameters())


def forward_flops(config: Config) -> int:
    """Floating point operations of one image's way through the denoiser (and its classifier), from shapes alone.

    Matrix products, convolutions and attention, a multiplication and an addition counted as two (torch's
    FlopCounterMode); what is done element by element is left out, as it is by convention.
    """
    from torch.utils.flop_counter import FlopCounterMode  # it imports Triton

    model, data = _shapes_of_model(config), config.data
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.device("meta"):
        image = torch.empty(1, data.channels, data.image_size, data.image_size)
        zero = torch.zeros(1, dtype=torch.int64)
        if model.head is None:
            model(image, zero, zero)
        else:
            model(image, zero, zero, image)
    return counter.get_total_flops()


def _shapes_of_model(config: Config) -> Denoiser:
    with torch.device("meta"):
        return build_denoiser(
            config.model,
            image_size=config.data.image_size,
            channels=config.data.channels,
            max_classes=config.max_classes,
        )


def micro_batches(
    current: Examples, rehearsed: Examples | None, count: int
) -> Iterator[tuple[Examples, Examples | None]]:
    """Cut a rank's share of a step into `count` equal micro-batches, rehearsal in the same proportion."""
    if count == 1:
        yield current, rehearsed
        return
    for number in range(count):
        yield _part(current, number, count), None if rehearsed is None else _part(rehearsed, number, count)


def replay_metrics(stats: Mapping[str, Any]) -> dict[str, float]:
    """What the log and the progress bar show of a replay source."""
    needed = stats["pool_needed"]
    return {
        "pool_ready": stats["pool_ready"],
        "pool_fill": stats["pool_ready"] / needed if needed else 1.0,
        "starved_seconds": stats["starved_seconds"],
        "teacher_evaluations": stats["teacher_evaluations"],
    }


def _part(examples: Examples, number: int, count: int) -> Examples:
    size = len(examples) // count
    return examples.rows(slice(number * size, (number + 1) * size))
