"""Where a method's replay points come from: a pool filled by samplers, or the teacher in the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from trainer.config import Config, OwnPoints, Placement
from trainer.data.batch import Examples
from trainer.data.remote import open_cache
from trainer.diffusion.samplers import Predict
from trainer.diffusion.schedules import NoiseSchedule
from trainer.pulse import LONGEST_INTERVAL, Ranks
from trainer.replay.points import first_points, to_examples
from trainer.replay.pool_source import Journal, PoolSource
from trainer.replay.request import ReplayRequest
from trainer.replay.teacher import open_teacher
from trainer.replay.trajectory import sample_trajectories
from trainer.run import RunDir
from trainer.seeds import derive

__all__ = ["CurrentSource", "InlineSource", "PoolSource", "ReplaySource", "open_source"]


# What a source without a pool has to say of one.
POOLLESS: dict[str, Any] = {
    "points_used": 0,
    "teacher_evaluations": 0,
    "starved_seconds": 0.0,
    "starved_steps": 0,
    "pool_ready": 0,
    "pool_needed": 0,
}


class ReplaySource(Protocol):
    """What the loop knows of replay. `words`, `heed` and `wait` are the source's part of `trainer.pulse`."""

    @property
    def width(self) -> int:
        """How many words `words` gives."""
        ...

    def words(self, step: int) -> list[int]:
        """What this rank tells the others before a step. Raises UserError, of which all ranks then learn."""
        ...

    def heed(self, step: int, rows: Sequence[Sequence[int]]) -> int:
        """Take in every rank's words; the first step that cannot begin yet."""
        ...

    def wait(self, step: int, seconds: float) -> None:
        """Let some time pass, less where a step's points arrive."""
        ...

    def points(self, step: int, current: Examples | None = None) -> Examples | None:
        """This rank's share of a step's replay points, on its device; None where the step goes without.

        `current` are its real images of the step, for a source that asks the teacher about those.
        """
        ...

    def release(self, step: int) -> None:
        """A checkpoint after `step` steps is published; told to the main rank."""
        ...

    def stats(self) -> dict[str, Any]:
        """Counters over the task so far and, on the main rank, the state of the pool; the device is not touched."""
        ...

    def close(self) -> None:
        """Leave no thread behind."""
        ...


class ReadySource:
    """The part of a source that is never short of points and has nothing to agree on."""

    width = 0

    def words(self, step: int) -> list[int]:
        return []

    def heed(self, step: int, rows: Sequence[Sequence[int]]) -> int:
        return step + LONGEST_INTERVAL

    def wait(self, step: int, seconds: float) -> None:
        raise AssertionError("never short of points")

    def release(self, step: int) -> None:
        """Nothing is given back."""

    def close(self) -> None:
        """There is no thread."""


class InlineSource(ReadySource):
    """The papers' way: the training process itself samples one fresh trajectory for each replay point.

    N + 1 evaluations of the teacher per point (2 N + 1 guided), one less where the target is the noise or the point
    lies on the path, and one in all where nothing is sampled. Position p uses trajectory p; points are the same, up to
    the composition of the teacher's batches, as those of a pool with one point per trajectory.
    """

    def __init__(
        self,
        teacher: Predict,
        schedule: NoiseSchedule,
        request: ReplayRequest,
        *,
        batch: int,
        world: Ranks,
        device: torch.device,
        dtype: torch.dtype,
        restored: Mapping[str, float] | None = None,
    ) -> None:
        """`teacher` is frozen and on `device`; `batch` is over all ranks."""
        assert request.points_per_trajectory == 1, "one point of each trajectory"
        assert batch % world.size == 0, "checked before the run starts"
        self.teacher, self.schedule, self.request = teacher, schedule.to(device), request
        self.batch, self.world, self.device, self.dtype = batch, world, device, dtype
        self.counters = {name: (restored or {}).get(name, 0) for name in ("points_used", "teacher_evaluations")}

    def points(self, step: int, current: Examples | None = None) -> Examples:
        share, size = self.batch // self.world.size, self.request.sampler_batch
        first = step * self.batch + self.world.rank * share
        pieces = [self._piece(start, min(start + size, first + share)) for start in range(first, first + share, size)]
        self.counters["points_used"] += self.batch
        self.counters["teacher_evaluations"] += self.batch * self.request.evaluations_per_trajectory
        if len(pieces) == 1:
            return pieces[0]
        return Examples(
            torch.cat([piece.x for piece in pieces]),
            torch.cat([piece.t for piece in pieces]),
            torch.cat([piece.target for piece in pieces]),
            torch.cat([piece.label for piece in pieces]),
        )

    def stats(self) -> dict[str, Any]:
        return {**POOLLESS, **self.counters}

    def _piece(self, start: int, stop: int) -> Examples:
        indices = np.arange(start, stop, dtype=np.int64)
        batch = sample_trajectories(self.teacher, self.schedule, self.request, indices, self.device)
        return to_examples(self.request, first_points(batch), self.schedule, self.device, self.dtype)


class CurrentSource(ReadySource):
    """The current task's own noisy images, with the teacher's prediction as the target: one evaluation per image.

    A class-conditional teacher is asked for classes that it knows: the label of position p is drawn from them by p.
    """

    def __init__(
        self,
        teacher: Predict,
        request: ReplayRequest,
        *,
        batch: int,
        world: Ranks,
        restored: Mapping[str, float] | None = None,
    ) -> None:
        """`teacher` is frozen and on the device of the images; `batch` is over all ranks."""
        self.teacher, self.request, self.batch, self.world = teacher, request, batch, world
        self.counters = {name: (restored or {}).get(name, 0) for name in ("points_used", "teacher_evaluations")}

    @torch.no_grad()
    def points(self, step: int, current: Examples | None = None) -> Examples:
        assert current is not None and len(current) * self.world.size == self.batch, "checked before the run starts"
        label = self._labels(step * self.batch + self.world.rank * len(current), current.label)
        size = self.request.sampler_batch
        pieces = [slice(start, start + size) for start in range(0, len(current), size)]
        target = torch.cat([self.teacher(current.x[piece], current.t[piece], label[piece]) for piece in pieces])
        for name in self.counters:
            self.counters[name] += self.batch
        return Examples(current.x, current.t, target.to(current.target.dtype), label)

    def stats(self) -> dict[str, Any]:
        return {**POOLLESS, **self.counters}

    def _labels(self, first: int, like: torch.Tensor) -> torch.Tensor:
        """int64 (B,), of the positions from `first` on."""
        request = self.request
        if not request.conditional:
            return like
        positions = np.arange(first, first + len(like), dtype=np.uint64)
        drawn = derive(request.seed, f"lwf-label/{request.task}", positions).view(np.uint64)
        labels = np.asarray(request.classes, dtype=np.int64)[drawn % np.uint64(len(request.classes))]
        return torch.from_numpy(labels).to(like.device, non_blocking=True)


def open_source(
    config: Config,
    run: RunDir,
    request: ReplayRequest,
    *,
    world: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    schedule: NoiseSchedule,
    start_step: int = 0,
    restored: Mapping[str, float] | None = None,
    journal: Journal | None = None,
) -> ReplaySource:
    """The source that `replay.placement` asks for, from `start_step` of the task on.

    Args:
        schedule: the student's, which is the teacher's.
        restored: `stats()` as saved with the checkpoint at `start_step`.

    Raises:
        UserError: no such teacher, or a pool of another one.
    """
    if config.replay.placement is Placement.inline:
        teacher, own = open_teacher(run, request, device)
        if config.points is OwnPoints.current:
            return CurrentSource(teacher, request, batch=config.replay_batch, world=world, restored=restored)
        return InlineSource(
            teacher,
            own,
            request,
            batch=config.replay_batch,
            world=world,
            device=device,
            dtype=dtype,
            restored=restored,
        )
    return PoolSource(
        run,
        request,
        batch=config.replay_batch,
        world=world,
        schedule=schedule,
        device=device,
        dtype=dtype,
        on_starved=config.replay.on_starved,
        timeout=config.replay.timeout,
        reuse_cap=config.replay.reuse_cap,
        start_step=start_step,
        prefetch=config.data.prefetch,
        restored=restored,
        journal=journal,
        cache=partial(open_cache, config.data) if request.store else None,
    )
