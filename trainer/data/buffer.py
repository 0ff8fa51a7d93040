"""A small buffer of real images for experience replay, kept as shards in the run directory.

Class-balanced, or a reservoir: a uniform sample of all images of the tasks so far (Vitter 1985), drawn by giving each
image a random number and keeping the smallest, so that it is a function of the seed and the images alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config import Buffer, MethodConfig, Verify
from trainer.data.dataset import KEY, TaskData, open_directory
from trainer.data.files import FilePool
from trainer.data.shards import LABEL_EXTENSION, Sample, read_index, write_index, write_shard
from trainer.errors import UserError
from trainer.seeds import smallest, smallest_of_each

SHARD_NAME = "buffer.tar"


def select(data: TaskData, per_class: int, seed: int, task: int) -> NDArray[np.int64]:
    """Indices of at most `per_class` samples of each class: a pure function of (seed, task) and the sample keys.

    The samples with the smallest derived seeds win, so the choice does not depend on how shards are cut or ordered.
    Classes in order of their ids, samples in order of their derived seeds.
    """
    return smallest_of_each(seed, f"buffer/{task}", data.keys, data.labels, per_class)


def reservoir(data: TaskData, size: int, seed: int) -> NDArray[np.int64]:
    """Indices of at most `size` samples, each equally likely whatever its class or task; in the order of their ranks.

    What is chosen of a part and of the rest is chosen of both together: reservoirs of single tasks are enough to make
    that of all tasks.
    """
    return smallest(seed, "reservoir", data.keys, size)


def choose(data: TaskData, method: MethodConfig, seed: int, task: int) -> NDArray[np.int64]:
    """What a method's buffer may ever need of one task's images."""
    if method.buffer is Buffer.reservoir:
        return reservoir(data, method.buffer_size, seed)
    return select(data, method.buffer_per_class, seed, task)


def save_buffer(data: TaskData, indices: NDArray[np.int64], directory: Path) -> None:
    """Copy some of one task's images, bytes and keys unchanged, and publish them atomically.

    Raises:
        UserError: an image that cannot be read, or a disk that cannot be written.
    """
    assert len(data.indexes) == 1, "a buffer holds samples of one task"
    index = data.indexes[0]
    chosen = data.subset(indices)
    samples = [
        Sample(
            key,
            {chosen.extension(row): chosen.read_bytes(row), LABEL_EXTENSION: str(int(chosen.labels[row])).encode()},
        )
        for row, key in enumerate(chosen.sample_keys)
    ]
    try:
        entry = write_shard(directory / SHARD_NAME, samples, [int(label) for label in chosen.labels])
        write_index(directory, replace(index, shards=[entry]))
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror}); key run.dir") from None


def open_buffers(directories: Sequence[Path], verify: Verify) -> TaskData:
    """The buffers of several tasks as one data set; its keys are those of the original images.

    Raises:
        UserError: a buffer that is missing or damaged.
    """
    pool = FilePool()
    parts: list[TaskData] = []
    for directory in directories:
        try:
            index = read_index(directory)
        except UserError as error:
            raise UserError(f"{error}; {KEY}") from None
        parts.append(open_directory(directory, index, verify, pool))
    return TaskData.concat(parts)


def open_rehearsed(directories: Sequence[Path], method: MethodConfig, seed: int, verify: Verify) -> TaskData:
    """What a method rehearses of the buffers of the tasks so far: of a reservoir what remains of them all.

    Raises:
        UserError: a buffer that is missing or damaged.
    """
    data = open_buffers(directories, verify)
    return data.subset(reservoir(data, method.buffer_size, seed)) if method.buffer is Buffer.reservoir else data
