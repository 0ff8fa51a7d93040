"""Which images each step took, by the keys that their shards give them (`tracking.seen_samples`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.data.stream import HostBatch
from trainer.run import RunDir
from trainer.tracking.log import MetricsLog
from trainer.world import World


class Keyed(Protocol):
    """What is needed of a data set; `trainer.data.dataset.TaskData` has it."""

    @property
    def keys(self) -> NDArray[np.uint64]: ...

    @property
    def sample_keys(self) -> list[str]: ...


def trace_samples(
    stream: Iterable[HostBatch], data: Keyed, run: RunDir, world: World, task: int, step: int
) -> Iterator[HostBatch]:
    """This rank's batches, each named in `run.seen_samples` before it is given out; collective.

    Args:
        stream: batches of samples of `data`, from step `step` (counted from 0) of the task on.
    """
    attempt = world.broadcast_int(run.newest_attempt())  # the main rank made its directory: others may not see it yet
    return _write_lines(stream, data, run.seen_samples(attempt, world.rank), task, step)


def _write_lines(stream: Iterable[HostBatch], data: Keyed, path: Path, task: int, step: int) -> Iterator[HostBatch]:
    names = dict(zip(data.keys.tolist(), data.sample_keys, strict=True))
    with MetricsLog(path) as log:
        for number, batch in enumerate(stream, step):
            log.append("seen", {"task": task, "step": number, "keys": [names[key] for key in batch.keys.tolist()]})
            yield batch
