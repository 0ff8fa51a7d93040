"""Shards whose teachers tell the classes of their own images (JDCL, arXiv 2411.08224): as many of each class.

Every trajectory of a shard has a class to fill, known beforehand. The teacher that knows the class samples images, in
an order of their own, and its classifier names the class of each; an image fills the next trajectory of its class and
is rejected where none is left. A teacher that does not make a class any more would be asked for ever: after
`request.candidates` images for each of its trajectories `request.missing` says what stands in for the rest, and the
shard's line in the manifest tells of both.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Missing, Solver
from trainer.diffusion.samplers import Predict, sample_path, timestep_grid
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.kernels.philox import normal
from trainer.replay.drawn import Made
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import (
    TrajectoryBatch,
    drawn_timesteps,
    point_seeds,
    relabel,
    teacher_call,
    trajectory_labels,
    trajectory_seeds,
)

Int64 = NDArray[np.int64]
GRAPHED = 16  # rows come in multiples of it: on CUDA each number of rows is a graph of its own


@dataclass(frozen=True)
class Labeller:
    """A teacher that classifies; `classes` are those it is asked for, `name` tells its images from another's, and
    `directory` where it lies to a person."""

    name: str
    directory: str
    predict: Predict
    classify: Callable[[Tensor], Tensor]  # (n, C, H, W) -> logits (n, K)
    schedule: NoiseSchedule
    classes: Sequence[int]


@dataclass
class _Found:
    """Images that fill the trajectories of one teacher: fp16 images (C, H, W), logits (K,) and start seeds, by row."""

    images: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    labels: dict[int, int] = field(default_factory=dict)
    seeds: dict[int, int] = field(default_factory=dict)
    sampled: int = 0
    lacking: Counter[int] = field(default_factory=Counter)

    def take(self, row: int, other: _Found, source: int) -> None:
        """Fill a row with what fills, or was rejected for, another one."""
        self.images[row], self.logits[row] = other.images[source], other.logits[source]
        self.labels[row], self.seeds[row] = other.labels[source], other.seeds[source]


def sample_labelled(
    teachers: Sequence[Labeller],
    request: ReplayRequest,
    shard: int,
    micro_batch: int,
    device: torch.device,
    pause: Callable[[], bool] = lambda: False,
    alive: Callable[[], None] | None = None,
) -> Made | None:
    """One shard; a pure function of the request, the shard's number and the micro-batch, on one kind of device.

    Args:
        micro_batch: images sampled at once.
        pause: called after each micro-batch; True: stop.
        alive: called at every evaluation of a network.

    Returns:
        None when told to stop.

    Raises:
        UserError: a class is missing, and the request says that the run ends then.
    """
    count = request.shard_trajectories
    indices = np.arange(shard * count, (shard + 1) * count, dtype=np.int64)
    wanted = trajectory_labels(request, indices)
    batch = _empty(request, indices, wanted, device)
    rejected, evaluations, lacking = 0, 0, Counter[int]()
    for asked in teachers:
        teacher = replace(asked, predict=teacher_call(asked.predict, alive))
        rows = np.flatnonzero(np.isin(wanted, np.asarray(teacher.classes)))
        if not len(rows):
            continue
        found = _fill(teacher, request, shard, rows, wanted, micro_batch, device, pause)
        if found is None:
            return None
        _enter(batch, rows, found, device)
        for part in _parts(rows, micro_batch, device):
            _ask(teacher, batch, part, device)
            if pause():
                return None
        rejected += found.sampled - len({found.seeds[row] for row in rows.tolist()})
        evaluations += found.sampled * (request.steps + 1) + len(rows) * request.points_per_trajectory
        lacking.update(found.lacking)
    return Made([replace(batch, evaluations=evaluations)], rejected, dict(sorted(lacking.items())))


def _empty(request: ReplayRequest, indices: Int64, wanted: Int64, device: torch.device) -> TrajectoryBatch:
    """A shard without images yet."""
    count, points, image = len(indices), request.points_per_trajectory, request.image_shape
    return TrajectoryBatch(
        indices,
        _on(wanted, device),
        torch.zeros(count, dtype=torch.int64, device=device),
        drawn_timesteps(request, indices, request.timesteps, device),
        _on(point_seeds(request, "noise", indices), device),
        end=torch.empty((count, *image), dtype=torch.float16, device=device),
        states=None,
        targets=torch.empty((count, points, *image), dtype=torch.float16, device=device),
        evaluations=0,
        logits=torch.empty((count, request.outputs), dtype=torch.float16, device=device),
    )


def _enter(batch: TrajectoryBatch, rows: Int64, found: _Found, device: torch.device) -> None:
    """Put the images of one teacher where they belong."""
    assert batch.end is not None and batch.logits is not None
    places, order = _on(rows, device), rows.tolist()
    batch.end[places] = torch.stack([found.images[row] for row in order])
    batch.logits[places] = torch.stack([found.logits[row] for row in order]).to(torch.float16)
    batch.label[places] = torch.tensor([found.labels[row] for row in order], device=device)
    batch.start_seeds[places] = torch.tensor([found.seeds[row] for row in order], device=device)


def _ask(teacher: Labeller, batch: TrajectoryBatch, rows: Int64, device: torch.device) -> None:
    """Have a teacher predict at the points of some of its images."""
    assert batch.end is not None and batch.targets is not None
    places = _on(rows, device)
    end, seeds, t = batch.end[places], batch.seeds[places], batch.t[places]
    answers = relabel(teacher.predict, teacher.schedule, end, seeds, t, None)
    batch.targets[places] = torch.stack(answers, dim=1)


def _fill(
    teacher: Labeller,
    request: ReplayRequest,
    shard: int,
    rows: Int64,
    wanted: Int64,
    micro_batch: int,
    device: torch.device,
    pause: Callable[[], bool],
) -> _Found | None:
    """Sample until every row has an image of its class, or enough were tried; None when told to stop."""
    open_rows = {label: [row for row in rows.tolist() if wanted[row] == label] for label in teacher.classes}
    found, spare = _Found(), _Found()
    limit = math.ceil(request.candidates * len(rows))
    stride = math.ceil(request.candidates * request.shard_trajectories)  # more than any shard asks for
    while found.sampled < limit and (left := sum(map(len, open_rows.values()))):
        start, count = found.sampled, min(micro_batch, _rounded(left), limit - found.sampled)
        numbers = np.arange(start, start + count, dtype=np.int64)
        sampled = _sample(teacher, request, shard * stride + numbers, device)
        for number, image in zip(numbers.tolist(), sampled, strict=True):
            fits = open_rows[image[2]]
            into, row = (found, fits.pop(0)) if fits else (spare, number)
            into.images[row], into.logits[row], into.labels[row], into.seeds[row] = image
        found.sampled += count
        if pause():
            return None
    _stand_in(teacher, request, found, spare, {label: left for label, left in open_rows.items() if left})
    return found


def _sample(
    teacher: Labeller, request: ReplayRequest, numbers: Int64, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, int, int]]:
    """Images of a teacher by their numbers: each with its logits, the class among the teacher's and the start seed."""
    start = trajectory_seeds(request, f"{teacher.name}-start", numbers, device)
    noise = trajectory_seeds(request, f"{teacher.name}-eta", numbers, device) if request.eta > 0 else None
    path = sample_path(
        teacher.predict,
        teacher.schedule,
        normal(start, request.image_shape),
        None,
        timestep_grid(teacher.schedule.timesteps, request.steps).to(device),
        solver=Solver(request.solver),
        eta=request.eta,
        clip=request.clip_sample,
        noise_seeds=noise,
    )
    end: Tensor | None = None
    for step in path:
        end = step.x_next
    assert end is not None, "a path has a step"
    images = end.to(torch.float16)
    logits = teacher.classify(images).float()
    classes = torch.tensor(list(teacher.classes), device=device)
    labels = classes[logits[:, classes].argmax(dim=1)]
    return zip(images, logits, labels.tolist(), start.tolist(), strict=True)


def _stand_in(
    teacher: Labeller, request: ReplayRequest, found: _Found, spare: _Found, lacking: dict[int, list[int]]
) -> None:
    """Fill the rows that are still open, by class, in the way the request asks for.

    Raises:
        UserError: it asks for none.
    """
    if not lacking:
        return
    if request.missing == Missing.fail.value:
        label, left = min(lacking.items())
        raise UserError(
            f"{teacher.directory}: of {found.sampled} images too few are of class {label}: {len(left)} more are needed "
            "(jdcl.missing=fail; keys jdcl.candidates, jdcl.missing)"
        )
    made = list(found.images)  # rows, in the order in which they were filled
    others = list(spare.images)
    for label, left in lacking.items():
        own = [row for row in made if found.labels[row] == label] if request.missing == Missing.repeat.value else []
        for number, row in enumerate(left):
            if own:
                found.take(row, found, own[number % len(own)])
            elif others:
                found.take(row, spare, others[number % len(others)])
            else:
                found.take(row, found, made[number % len(made)])
        found.lacking[label] += len(left)


def _parts(rows: Int64, size: int, device: torch.device) -> Iterator[Int64]:
    """Rows a micro-batch at a time; on CUDA the last ones are filled up with the last row."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        short = min(_rounded(len(part)), size) - len(part) if device.type == "cuda" else 0
        yield np.concatenate([part, np.repeat(part[-1:], short)])


def _rounded(count: int) -> int:
    """Up to a multiple of GRAPHED."""
    return -(-count // GRAPHED) * GRAPHED


def _on(values: Int64, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
