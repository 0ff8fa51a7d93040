"""A shard's trajectories on their way from the device to the disk, while the device samples the next shard."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch


class Clock:
    """Seconds that a device works on what is asked of it between construction and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = time.monotonic()
        self._seconds = 0.0
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        if self._events:
            self._events[0].record()

    def stop(self) -> None:
        """All has been asked for."""
        if self._events:
            self._events[1].record()
        else:
            self._seconds = time.monotonic() - self._began

    def wait(self) -> float:
        """Until the device has done it; how long that took."""
        if self._events:
            self._events[1].synchronize()
            return self._events[0].elapsed_time(self._events[1]) / 1e3
        return self._seconds


@dataclass(frozen=True)
class Made:
    """The trajectories of a shard. Of a labelled pool, `rejected` images were sampled in vain, and `lacking` counts by
    class the trajectories that something else had to fill."""

    batches: Sequence[TrajectoryBatch]
    rejected: int = 0
    lacking: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A shard that was asked of the device: its tensors are in host memory once `clock.wait()` returns."""

    request: ReplayRequest
    shard: int
    made: Made
    micro_batch: int
    clock: Clock


def draw(request: ReplayRequest, shard: int, made: Made, micro_batch: int, clock: Clock) -> Drawn:
    """Start the copies to the host; nothing waits for the device."""
    copied = [to_host(batch) for batch in made.batches]
    clock.stop()
    return Drawn(request, shard, replace(made, batches=copied), micro_batch, clock)


def to_host(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The batch in page-locked host memory, where the device will have copied it when its work so far is done."""
    values = {part.name: getattr(batch, part.name) for part in fields(batch)}
    return replace(batch, **{name: _to_host(value) for name, value in values.items() if isinstance(value, Tensor)})


def _to_host(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
