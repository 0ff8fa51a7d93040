"""Real images in the global order, read ahead by threads.

Step s takes positions [sG, (s+1)G) of the order, G the global batch; rank r of R takes the r-th of R equal slices. So
what a step sees depends on neither ranks nor workers, and resuming is arithmetic.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.data.order import positions
from trainer.errors import ConfigError, UserError


@dataclass(frozen=True)
class HostBatch:
    """A rank's share of one step: images (n,C,H,W) uint8, labels (n,) int64, and what its randomness depends on.

    `keys` (n,) uint64 are the samples' ids, `draws` (n,) uint64 count how often each was seen before (the epoch).
    """

    images: Tensor
    labels: Tensor
    keys: NDArray[np.uint64]
    draws: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.labels)


class Images(Protocol):
    """What a stream needs of a data set; `trainer.data.dataset.TaskData` has it."""

    @property
    def labels(self) -> NDArray[np.int64]: ...

    @property
    def keys(self) -> NDArray[np.uint64]: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def __len__(self) -> int: ...

    def read_into(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> None: ...


class RealStream:
    """The batches of steps [start_step, stop_step) for one rank, in step order; a context manager.

    `max(prefetch, workers)` batches at most are read ahead. An error of a reading thread is raised at its step, after
    the stream has closed itself.
    """

    def __init__(
        self,
        data: Images,
        *,
        seed: int,
        task: int,
        global_batch: int,
        rank: int,
        world_size: int,
        start_step: int,
        stop_step: int,
        workers: int,
        prefetch: int,
    ) -> None:
        """Raises ConfigError or UserError where no batch can be made."""
        _check(data, global_batch, world_size, workers, prefetch)
        assert 0 <= rank < world_size and 0 <= start_step <= stop_step
        self._data, self._seed, self._task = data, seed, task
        self._global_batch, self._rank = global_batch, rank
        self._local_batch = global_batch // world_size
        self._next_step, self._stop_step = start_step, stop_step
        self._depth = max(prefetch, workers)
        self._pending: deque[Future[HostBatch]] = deque()
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reader")
        self._pin = torch.cuda.is_available()  # so that the copy to the device does not hold up the step
        self._closed = False

    def read_step(self, step: int) -> HostBatch:
        """This rank's share of a step: a pure function of the step."""
        start = step * self._global_batch + self._rank * self._local_batch
        stop = start + self._local_batch
        indices, epochs = positions(self._seed, self._task, len(self._data), start, stop)
        # Page-locked memory comes from torch's own pool, which takes a batch's back only when copies from it are over.
        images = torch.empty((len(indices), *self._data.image_shape), dtype=torch.uint8, pin_memory=self._pin)
        self._data.read_into(indices, images.numpy())
        return HostBatch(
            images=images,
            labels=torch.from_numpy(self._data.labels[indices]),
            keys=self._data.keys[indices],
            draws=epochs.astype(np.uint64),
        )

    def __iter__(self) -> RealStream:
        return self

    def __next__(self) -> HostBatch:
        if self._closed:
            raise RuntimeError("the stream is closed")
        self._submit()
        if not self._pending:
            raise StopIteration
        future = self._pending.popleft()
        if future.exception() is not None:
            self.close()
        batch = future.result()
        self._submit()  # refill before the consumer computes
        return batch

    def _submit(self) -> None:
        while len(self._pending) < self._depth and self._next_step < self._stop_step:
            self._pending.append(self._threads.submit(self.read_step, self._next_step))
            self._next_step += 1

    def close(self) -> None:
        """Drop what is read ahead and wait for the threads to end: each finishes at most the batch it is reading."""
        self._closed = True
        self._pending.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> RealStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check(data: Images, global_batch: int, world_size: int, workers: int, prefetch: int) -> None:
    if not len(data):
        raise UserError("the data set holds no sample; key data.root")
    if global_batch < 1 or global_batch % world_size:
        raise ConfigError(f"train.global_batch={global_batch}: does not divide over {world_size} ranks")
    if workers < 1:
        raise ConfigError(f"data.workers={workers}: must be above 0")
    if prefetch < 1:
        raise ConfigError(f"data.prefetch={prefetch}: must be above 0")
