"""Sampling trajectories of the teacher: a pure function of the request and the trajectories' indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Prediction
from trainer.diffusion.samplers import DDIMStep, Predict, ddim, timestep_grid
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.noise import add_noise
from trainer.kernels.philox import normal, timesteps, uniform
from trainer.replay.request import ReplayRequest
from trainer.seeds import derive

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class TrajectoryBatch:
    """B trajectories with P points each.

    Shapes: indices, label, start_seeds (B,) int64; t and seeds (B, P) int64, where `seeds` is the noise of a
    re-noised point (unused on a trajectory); images fp16, the end points (B, C, H, W) of `renoised` or the states
    (B, P, C, H, W) of `trajectory`; targets fp16 (B, P, C, H, W), the teacher's predictions there, or None where
    the target is the noise. `evaluations` counts network evaluations, one per image.
    """

    indices: Int64
    label: Tensor
    start_seeds: Tensor
    t: Tensor
    seeds: Tensor
    images: Tensor
    targets: Tensor | None
    evaluations: int


def trajectory_labels(request: ReplayRequest, indices: Int64) -> Int64:
    """Labels, (B,): each run of C trajectories holds every class once, in an order of its own; -1 without classes."""
    if not request.conditional:
        return np.full(indices.shape, -1, dtype=np.int64)
    count = len(request.classes)
    blocks = (indices // count).astype(np.uint64)
    ranks = derive(request.seed, f"replay-label/{request.task}", blocks[:, None], np.arange(count, dtype=np.uint64))
    order = np.argsort(ranks, axis=1, kind="stable")
    chosen = np.take_along_axis(order, (indices % count)[:, None], axis=1)[:, 0]
    return np.asarray(request.classes, dtype=np.int64)[chosen]


def point_seeds(request: ReplayRequest, purpose: str, indices: Int64) -> Int64:
    """One seed for each point of each trajectory, (B, P)."""
    points = np.arange(request.points_per_trajectory, dtype=np.uint64)
    return derive(request.seed, f"replay-{purpose}/{request.task}", indices.astype(np.uint64)[:, None], points)


@torch.no_grad()
def sample_trajectories(
    teacher: Predict,
    schedule: NoiseSchedule,
    request: ReplayRequest,
    indices: Int64,
    device: torch.device,
    alive: Callable[[], None] | None = None,
) -> TrajectoryBatch:
    """Run the teacher along the trajectories `indices` (B,) and take their replay points.

    Guidance shapes the paths, so the states and end points, and nothing else: the targets are the teacher's predictions
    for the class alone. What the student takes over is then the teacher's own model, which can be guided in its turn;
    distilled guided predictions would be guided again by the next teacher, and sharpened with each task.

    Equal bytes on one kind of device need equal batches: callers always cut a shard into the same micro-batches.
    `alive` is called at every evaluation of the network.
    """
    start = _trajectory_seeds(request, "start", indices, device)
    label = torch.from_numpy(trajectory_labels(request, indices)).to(device, non_blocking=True)
    predict = teacher_call(teacher, alive)
    grid = timestep_grid(
        schedule.timesteps,
        request.steps,
        _trajectory_seeds(request, "grid", indices, device) if request.jitter else None,
    )
    path = ddim(
        predict,
        schedule,
        normal(start, request.image_shape),
        label,
        grid.to(device, non_blocking=True),
        eta=request.eta,
        guidance=request.guidance,
        null_label=request.null_label,
        clip=request.clip_sample,
        noise_seeds=_trajectory_seeds(request, "eta", indices, device) if request.eta > 0 else None,
    )
    seeds = torch.from_numpy(point_seeds(request, "noise", indices)).to(device, non_blocking=True)
    if request.renoised:
        t = torch.from_numpy(point_seeds(request, "timestep", indices)).to(device, non_blocking=True)
        t = timesteps(t.reshape(-1), schedule.timesteps).view(t.shape)
        images = _end_point(path)
        targets = relabel(predict, schedule, images, seeds, t, label) if request.teacher_targets else None
    else:
        t, images, targets = _points_on_path(path, _chosen_steps(request, indices, device), request.image_shape)
    evaluations = len(indices) * request.evaluations_per_trajectory
    return TrajectoryBatch(indices, label, start, t, seeds, images, targets, evaluations)


def relabel(predict: Predict, schedule: NoiseSchedule, end: Tensor, seeds: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """The teacher's predictions at re-noised end points, fp16 (B, P, C, H, W).

    `end` (B, C, H, W) is the fp16 end point as it is stored, so the trainer rebuilds this very x_t from it.
    """
    targets = [
        predict(renoise(schedule, end, seeds[:, point], t[:, point])[0], t[:, point], label).to(torch.float16)
        for point in range(t.shape[1])
    ]
    return torch.stack(targets, dim=1)


def renoise(
    schedule: NoiseSchedule, end: Tensor, seeds: Tensor, t: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x_t of an end point and the noise (or v) in it, both (B, C, H, W)."""
    predict_v = schedule.prediction is Prediction.v
    return add_noise(end, seeds, t, schedule.signal, schedule.sigma, flip=None, predict_v=predict_v, dtype=dtype)


def teacher_call(teacher: Predict, alive: Callable[[], None] | None = None) -> Predict:
    """The teacher, its prediction in its own type; `alive` is called before each evaluation."""

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        if alive is not None:
            alive()
        return teacher(x, t, label)

    return predict


def _trajectory_seeds(request: ReplayRequest, purpose: str, indices: Int64, device: torch.device) -> Tensor:
    seeds = derive(request.seed, f"replay-{purpose}/{request.task}", indices.astype(np.uint64))
    return torch.from_numpy(seeds).to(device, non_blocking=True)  # a plain copy would wait for all work before it


def _end_point(path: Iterable[DDIMStep]) -> Tensor:
    end: Tensor | None = None
    for step in path:
        end = step.x_next
    assert end is not None
    return end.to(torch.float16)


def _chosen_steps(request: ReplayRequest, indices: Int64, device: torch.device) -> Tensor:
    """Which P of the N steps each trajectory gives, ascending, (B, P): one drawn from each P-th part of the path."""
    count, steps = request.points_per_trajectory, request.steps
    bounds = torch.tensor([point * steps // count for point in range(count + 1)]).to(device, non_blocking=True)
    low, width = bounds[:-1], bounds.diff()
    draws = uniform(_trajectory_seeds(request, "choice", indices, device), count)
    return low + torch.minimum((draws * width).to(torch.int64), width - 1)


def _points_on_path(
    path: Iterable[DDIMStep], chosen: Tensor, shape: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Timesteps (B, P), states and predictions fp16 (B, P, C, H, W) at the chosen steps."""
    states = torch.zeros(*chosen.shape, *shape, dtype=torch.float16, device=chosen.device)
    targets, t = torch.zeros_like(states), torch.zeros_like(chosen)
    for number, step in enumerate(path):
        hit = chosen == number
        wide = hit[:, :, None, None, None]
        states = torch.where(wide, step.x.to(torch.float16)[:, None], states)
        targets = torch.where(wide, step.prediction.to(torch.float16)[:, None], targets)
        t = torch.where(hit, step.t[:, None], t)
    return t, states, targets
