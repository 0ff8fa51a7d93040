"""From stored trajectories to training pairs on the device: the way of one replay point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import Examples
from trainer.diffusion.schedules import NoiseSchedule
from trainer.replay.decode import DecodedShard
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch, renoise

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class StoredPoints:
    """n replay points as stored: images (n, C, H, W) fp16 end points or states, targets fp16 or None for the noise;
    t, seeds and label (n,) int64."""

    images: Tensor
    targets: Tensor | None
    t: Tensor
    seeds: Tensor
    label: Tensor

    def to(self, device: torch.device) -> StoredPoints:
        targets = None if self.targets is None else self.targets.to(device, non_blocking=True)
        images, t, seeds, label = (
            part.to(device, non_blocking=True) for part in (self.images, self.t, self.seeds, self.label)
        )
        return StoredPoints(images, targets, t, seeds, label)


def gather(
    request: ReplayRequest, parts: list[tuple[Int64, DecodedShard, Int64, Int64]], count: int, *, pin: bool = False
) -> StoredPoints:
    """Points in the order of their positions; `pin`: in page-locked memory, from which copies to a GPU do not block.

    Each part is one shard's share: places in the batch (m,), the shard, trajectories within it (m,), points (m,).
    """
    numbers = torch.empty((3, count), dtype=torch.int64, pin_memory=pin)
    shape = (2 if request.teacher_targets else 1, count, *request.image_shape)
    pixels = torch.empty(shape, dtype=torch.float16, pin_memory=pin)
    label, t, seeds = numbers.numpy()
    images, targets = pixels[0].numpy(), pixels[1].numpy() if request.teacher_targets else None
    for places, shard, trajectories, points in parts:
        label[places] = shard.label[trajectories]
        t[places] = shard.t[trajectories, points]
        seeds[places] = shard.seeds[trajectories, points]
        images[places] = shard.images[trajectories] if request.renoised else shard.images[trajectories, points]
        if targets is not None and shard.targets is not None:
            targets[places] = shard.targets[trajectories, points]
    return StoredPoints(pixels[0], None if targets is None else pixels[1], numbers[1], numbers[2], numbers[0])


def first_points(request: ReplayRequest, batch: TrajectoryBatch) -> StoredPoints:
    """The first point of each trajectory of a fresh batch."""
    images = batch.images if request.renoised else batch.images[:, 0]
    targets = None if batch.targets is None else batch.targets[:, 0]
    return StoredPoints(images, targets, batch.t[:, 0], batch.seeds[:, 0], batch.label)


def to_examples(
    request: ReplayRequest, points: StoredPoints, schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype
) -> Examples:
    """Training pairs: x_t as stored, or rebuilt from end point and seed; the target as stored, or the noise (or v)."""
    points = points.to(device)
    if request.renoised:
        x, noise = renoise(schedule, points.images, points.seeds, points.t, dtype)
    else:
        x, noise = points.images.to(dtype), None
    target = noise if points.targets is None else points.targets.to(dtype)
    assert target is not None
    return Examples(x, points.t, target, points.label)
