"""Sampling trajectories of the teacher: a pure function of the request and the trajectories' indices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Prediction, Solver
from trainer.diffusion.samplers import PathStep, Predict, sample_path, timestep_grid
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
    re-noised point, or a point that is nothing else (unused on a path). In fp16, and None where no point needs them:
    end (B, C, H, W), the end points that are noised again; states (B, P', C, H, W) of the first P' points, which lie on
    the path; targets (B, P, C, H, W), the teacher's predictions, None where the target is the noise; logits (B, K),
    the teacher's of the end points, of a labelled pool. `evaluations` counts network evaluations, one per image.
    """

    indices: Int64
    label: Tensor
    start_seeds: Tensor
    t: Tensor
    seeds: Tensor
    end: Tensor | None
    states: Tensor | None
    targets: Tensor | None
    evaluations: int
    logits: Tensor | None = None


def trajectory_labels(request: ReplayRequest, indices: Int64) -> Int64:
    """Labels, (B,): each run of C trajectories holds every class once, in an order of its own; -1 without classes."""
    if not request.known_classes:
        return np.full(indices.shape, -1, dtype=np.int64)
    count = len(request.known_classes)
    blocks = (indices // count).astype(np.uint64)
    ranks = derive(request.seed, f"replay-label/{request.task}", blocks[:, None], np.arange(count, dtype=np.uint64))
    order = np.argsort(ranks, axis=1, kind="stable")
    chosen = np.take_along_axis(order, (indices % count)[:, None], axis=1)[:, 0]
    return np.asarray(request.known_classes, dtype=np.int64)[chosen]


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
    if not request.sampled:
        return _ask_about_noise(teacher_call(teacher, alive), schedule, request, indices, device)
    assert not request.labelled, "see trainer.replay.labelled"
    start = trajectory_seeds(request, "start", indices, device)
    label = torch.from_numpy(trajectory_labels(request, indices)).to(device, non_blocking=True)
    predict = teacher_call(teacher, alive)
    grid = timestep_grid(
        schedule.timesteps,
        request.steps,
        trajectory_seeds(request, "grid", indices, device) if request.jitter else None,
    )
    path = sample_path(
        predict,
        schedule,
        normal(start, request.image_shape),
        label,
        grid.to(device, non_blocking=True),
        solver=Solver(request.solver),
        eta=request.eta,
        guidance=request.guidance,
        null_label=request.null_label,
        clip=request.clip_sample,
        noise_seeds=trajectory_seeds(request, "eta", indices, device) if request.eta > 0 else None,
    )
    seeds = torch.from_numpy(point_seeds(request, "noise", indices)).to(device, non_blocking=True)
    on_path, end = _walk(path, request, indices, device)
    t, targets = on_path.t, on_path.targets
    if request.renoised_points:
        drawn = drawn_timesteps(request, indices, schedule.timesteps, device)
        t = [*t, *drawn.unbind(1)]
        if request.teacher_targets:
            targets = [*targets, *relabel(predict, schedule, end, seeds[:, request.path_points :], drawn, label)]
    return TrajectoryBatch(
        indices,
        label,
        start,
        torch.stack(t, dim=1),
        seeds,
        end=end if request.renoised_points else None,
        states=torch.stack(on_path.states, dim=1) if request.path_points else None,
        targets=torch.stack(targets, dim=1) if targets else None,
        evaluations=len(indices) * request.evaluations_per_trajectory,
    )


def _ask_about_noise(
    predict: Predict, schedule: NoiseSchedule, request: ReplayRequest, indices: Int64, device: torch.device
) -> TrajectoryBatch:
    """Points that are their own noise: the teacher's predictions at it, at timesteps of any size."""
    label = torch.from_numpy(trajectory_labels(request, indices)).to(device, non_blocking=True)
    seeds = torch.from_numpy(point_seeds(request, "noise", indices)).to(device, non_blocking=True)
    t = drawn_timesteps(request, indices, schedule.timesteps, device)
    targets = [
        predict(normal(seeds[:, point], request.image_shape), t[:, point], label).to(torch.float16)
        for point in range(request.points_per_trajectory)
    ]
    return TrajectoryBatch(
        indices,
        label,
        trajectory_seeds(request, "start", indices, device),
        t,
        seeds,
        end=None,
        states=None,
        targets=torch.stack(targets, dim=1),
        evaluations=len(indices) * request.evaluations_per_trajectory,
    )


def relabel(
    predict: Predict, schedule: NoiseSchedule, end: Tensor, seeds: Tensor, t: Tensor, label: Tensor | None
) -> list[Tensor]:
    """The teacher's predictions at re-noised end points, fp16 (B, C, H, W) for each column of seeds and t.

    `end` (B, C, H, W) is the fp16 end point as it is stored, so the trainer rebuilds this very x_t from it.
    """
    return [
        predict(renoise(schedule, end, seeds[:, point], t[:, point])[0], t[:, point], label).to(torch.float16)
        for point in range(t.shape[1])
    ]


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


def trajectory_seeds(request: ReplayRequest, purpose: str, indices: Int64, device: torch.device) -> Tensor:
    seeds = derive(request.seed, f"replay-{purpose}/{request.task}", indices.astype(np.uint64))
    return torch.from_numpy(seeds).to(device, non_blocking=True)  # a plain copy would wait for all work before it


def drawn_timesteps(request: ReplayRequest, indices: Int64, count: int, device: torch.device) -> Tensor:
    """Timesteps of the R re-noised points, int64 (B, R): each uniform over the `count` of the schedule.

    Stratified, point k is uniform over the k-th of R equal parts of [0, count), rounded down.
    """
    seeds = torch.from_numpy(point_seeds(request, "timestep", indices)[:, request.path_points :])
    seeds = seeds.to(device, non_blocking=True)
    if not request.stratified:
        return timesteps(seeds.reshape(-1), count).view(seeds.shape)
    parts = seeds.shape[1]
    number = torch.arange(parts, device=device)
    draws = (number + uniform(seeds.reshape(-1), 1).view(seeds.shape)) / parts
    last = ((number + 1) * count + parts - 1) // parts - 1  # rounding up may not lead into the next part
    return torch.minimum((draws * count).to(torch.int64), last)


def _chosen_steps(request: ReplayRequest, indices: Int64, device: torch.device) -> Tensor:
    """Which P' of the N steps each trajectory gives, ascending, (B, P'): one drawn from each P'-th part of the path.

    Never the first step: it is at T - 1 on every path, and as many points there would hold the student's first step to
    what the teacher knew, at the cost of the new classes.
    """
    count, steps = request.path_points, request.steps
    bounds = torch.tensor([1 + point * (steps - 1) // count for point in range(count + 1)])
    bounds = bounds.to(device, non_blocking=True)
    low, width = bounds[:-1], bounds.diff()
    draws = uniform(trajectory_seeds(request, "choice", indices, device), count)
    return low + torch.minimum((draws * width).to(torch.int64), width - 1)


@dataclass(frozen=True)
class _OnPath:
    """The P' points on the paths, one after the other: timesteps (B,), states and predictions fp16 (B, C, H, W)."""

    t: list[Tensor]
    states: list[Tensor]
    targets: list[Tensor]


def _walk(
    path: Iterable[PathStep], request: ReplayRequest, indices: Int64, device: torch.device
) -> tuple[_OnPath, Tensor]:
    """Go along the paths; their points, and their end points fp16 (B, C, H, W)."""
    count, steps = request.path_points, request.steps
    chosen = _chosen_steps(request, indices, device) if count else None
    points = _OnPath([], [], [])
    end: Tensor | None = None
    for number, step in enumerate(path):
        end = step.x_next
        if chosen is not None and number:
            point = (number * count - 1) // (steps - 1)  # the part of the path that this step belongs to
            _take(points, step, point, chosen[:, point] == number)
    assert end is not None, "a path has a step"
    return points, end.to(torch.float16)


def _take(points: _OnPath, step: PathStep, point: int, chosen: Tensor) -> None:
    """Let a step stand for a point: the first step of its part for all trajectories, a later one where chosen, (B,)."""
    found = (step.t, step.x.to(torch.float16), step.prediction.to(torch.float16))
    for kept, new in zip((points.t, points.states, points.targets), found, strict=True):
        if point == len(kept):
            kept.append(new)
        else:
            kept[point] = torch.where(chosen.view(-1, *[1] * (new.dim() - 1)), new, kept[point])
