"""From stored trajectories to training pairs on the device: the way of one replay point."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.batch import Examples, JointExamples
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.philox import normal
from trainer.replay.decode import DecodedShard, Float16
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch, renoise

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class StoredPoints:
    """n replay points as stored: images (n, C, H, W) fp16 end points or states, or None where the point is the noise of
    its seed; targets fp16 or None for the noise; logits (n, K) fp16 of the images of a labelled pool;
    t, seeds and label (n,) int64; on_path (n,) bool, which images are states, or None where all are of one kind."""

    images: Tensor | None
    targets: Tensor | None
    t: Tensor
    seeds: Tensor
    label: Tensor
    on_path: Tensor | None
    logits: Tensor | None = None

    def to(self, device: torch.device) -> StoredPoints:
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        here = {name: part for name, part in parts.items() if isinstance(part, Tensor)}
        return replace(self, **{name: part.to(device, non_blocking=True) for name, part in here.items()})


def gather(
    request: ReplayRequest, parts: list[tuple[Int64, DecodedShard, Int64, Int64]], count: int, *, pin: bool = False
) -> StoredPoints:
    """Points in the order of their positions; `pin`: in page-locked memory, from which copies to a GPU do not block.

    Each part is one shard's share: places in the batch (m,), the shard, trajectories within it (m,), points (m,).
    """
    numbers = torch.empty((3, count), dtype=torch.int64, pin_memory=pin)
    arrays = [request.sampled, request.teacher_targets]
    pixels = torch.empty((sum(arrays), count, *request.image_shape), dtype=torch.float16, pin_memory=pin)
    images, targets = (pixels[sum(arrays[:kind])] if there else None for kind, there in enumerate(arrays))
    on_path = torch.empty(count, dtype=torch.bool, pin_memory=pin) if _mixed(request) else None
    logits = torch.empty((count, request.outputs), dtype=torch.float16, pin_memory=pin) if request.labelled else None
    label, t, seeds = numbers.numpy()
    for places, shard, trajectories, points in parts:
        label[places] = shard.label[trajectories]
        t[places] = shard.t[trajectories, points]
        seeds[places] = shard.seeds[trajectories, points]
        if images is not None:
            _gather_images(images.numpy(), places, shard, trajectories, points)
        if on_path is not None:
            on_path.numpy()[places] = points < request.path_points
        if targets is not None and shard.targets is not None:
            targets.numpy()[places] = shard.targets[trajectories, points]
        if logits is not None and shard.logits is not None:
            logits.numpy()[places] = shard.logits[trajectories]
    return StoredPoints(
        images,
        targets,
        t=numbers[1],
        seeds=numbers[2],
        label=numbers[0],
        on_path=on_path,
        logits=logits,
    )


def _mixed(request: ReplayRequest) -> bool:
    """Whether a trajectory has points of both kinds."""
    return request.path_points > 0 and request.renoised_points > 0


def _gather_images(out: Float16, places: Int64, shard: DecodedShard, trajectories: Int64, points: Int64) -> None:
    """Put into out[places] the states of the points that lie on a path, the end points of the others."""
    if shard.states is None:
        assert shard.end is not None, "no points without images"
        out[places] = shard.end[trajectories]
    elif shard.end is None:
        out[places] = shard.states[trajectories, points]
    else:
        state = points < shard.states.shape[1]
        out[places[state]] = shard.states[trajectories[state], points[state]]
        out[places[~state]] = shard.end[trajectories[~state]]


def first_points(batch: TrajectoryBatch) -> StoredPoints:
    """The first point of each trajectory of a fresh batch: all of one kind."""
    images = batch.end if batch.states is None else batch.states[:, 0]
    targets = None if batch.targets is None else batch.targets[:, 0]
    return StoredPoints(images, targets, batch.t[:, 0], batch.seeds[:, 0], batch.label, on_path=None)


def to_examples(
    request: ReplayRequest, points: StoredPoints, schedule: NoiseSchedule, device: torch.device, dtype: torch.dtype
) -> Examples:
    """Training pairs: x_t as stored, or rebuilt from end point and seed; the target as stored, or the noise (or v).

    Of a labelled pool they are JointExamples: the end points are what the classifier sees, and the noise is there, too.
    """
    points = points.to(device)
    images, noise = points.images, None
    if images is None:
        x = normal(points.seeds, request.image_shape).to(dtype)
    elif request.renoised_points:
        x, noise = renoise(schedule, images, points.seeds, points.t, dtype)
        if points.on_path is not None:
            x = torch.where(points.on_path[:, None, None, None], images.to(dtype), x)
    else:
        x = images.to(dtype)
    target = noise if points.targets is None else points.targets.to(dtype)
    assert target is not None
    if points.logits is None:
        return Examples(x, points.t, target, points.label)
    assert images is not None and noise is not None
    known = torch.ones_like(points.label, dtype=torch.bool)
    return JointExamples(x, points.t, target, points.label, images.to(dtype), known, noise=noise, logits=points.logits)
