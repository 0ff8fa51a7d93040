"""Reading task shards: samples are found by their offset in the index, never by reading whole files.

Files are read with positioned reads, not mapped into memory: a shard that is cut short under a map kills the process,
a read that comes back short is an error with a name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.config import Verify
from trainer.data.files import FilePool
from trainer.data.images import IMAGE_EXTENSIONS, RAW_EXTENSION, decode_image, image_extension, raw_header
from trainer.data.shards import DatasetCard, ShardEntry, SplitIndex, read_card, read_index, task_directory
from trainer.errors import UserError, one_line
from trainer.seeds import hash_keys

KEY = "key data.root"  # what a person changes when shards are not as they should be


class ShardFiles(Protocol):
    """Where the shards of a data set are read: files, or objects of a store (`trainer.data.remote`)."""

    def check(self, directory: Path, index: SplitIndex, verify: Verify) -> None:
        """Raises UserError, naming the file, where a shard is missing or damaged as far as `verify` looks."""
        ...

    def name(self, path: Path) -> str: ...

    def read(self, path: Path, offset: int, size: int) -> bytes: ...

    def opened(self, path: Path) -> AbstractContextManager[int]: ...

    def fetch_ahead(self) -> None: ...

    def interrupt(self) -> None: ...


@dataclass(frozen=True)
class _File:
    """One shard file and the pool through which it is read."""

    path: Path
    pool: ShardFiles

    @property
    def name(self) -> str:
        return self.pool.name(self.path)


@dataclass(frozen=True)
class TaskData:
    """Labelled images of some tasks, in the order of the index. Thread-safe.

    `spans` (N, 3) int64 holds for each sample the number of its file, the first byte and the size of its image;
    `formats` (N,) uint8 the place of that member's extension in IMAGE_EXTENSIONS; `labels` (N,) int64 the class id;
    `keys` (N,) uint64 the hash of "<split>/<task>/<sample key>", on which all of a sample's randomness depends.
    """

    indexes: list[SplitIndex]  # of what was opened, one per task directory (or buffer), without their shards
    image_size: int
    channels: int
    sample_keys: list[str]
    labels: NDArray[np.int64]
    keys: NDArray[np.uint64]
    spans: NDArray[np.int64]
    formats: NDArray[np.uint8]
    files: list[_File]

    @staticmethod
    def open(
        root: Path, split: str, tasks: Sequence[int], verify: Verify, shards: ShardFiles | None = None
    ) -> TaskData:
        """The `train` or `test` split of tasks, counted from 1; several tasks are joined in the order given.

        `shards`: what reads them, where they are no files under `root`.

        Raises:
            UserError: a task that is not built, or a file that is missing, corrupt (as far as `verify` looks) or
                contradicts `dataset.json`; one line naming file and key, before any image is read.
        """
        try:
            card = read_card(root)
            indexes = [_read_task(root, card, split, task) for task in tasks]
        except UserError as error:
            raise UserError(f"{error}; {KEY}") from None
        pool = shards or FilePool()
        parts = [
            open_directory(task_directory(root, split, task), index, verify, pool)
            for task, index in zip(tasks, indexes, strict=True)
        ]
        return TaskData.concat(parts)

    @staticmethod
    def concat(parts: Sequence[TaskData]) -> TaskData:
        """One data set after another.

        Raises:
            UserError: images of different shapes.
        """
        assert parts, "nothing to join"
        shapes = {(part.image_size, part.channels) for part in parts}
        if len(shapes) != 1:
            where = ", ".join(part.files[0].name for part in parts if part.files)
            raise UserError(f"{where}: images of different shapes cannot be joined; {KEY}")
        starts = np.cumsum([0, *(len(part.files) for part in parts[:-1])])
        spans = [part.spans + np.array([start, 0, 0]) for part, start in zip(parts, starts, strict=True)]
        return TaskData(
            indexes=[index for part in parts for index in part.indexes],
            image_size=parts[0].image_size,
            channels=parts[0].channels,
            sample_keys=[key for part in parts for key in part.sample_keys],
            labels=np.concatenate([part.labels for part in parts]),
            keys=np.concatenate([part.keys for part in parts]),
            spans=np.concatenate(spans),
            formats=np.concatenate([part.formats for part in parts]),
            files=[file for part in parts for file in part.files],
        )

    def subset(self, indices: NDArray[np.int64]) -> TaskData:
        """The samples at `indices`, in that order."""
        return replace(
            self,
            sample_keys=[self.sample_keys[index] for index in indices.tolist()],
            labels=self.labels[indices],
            keys=self.keys[indices],
            spans=self.spans[indices],
            formats=self.formats[indices],
        )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def classes(self) -> list[int]:
        """Class ids of the tasks, sorted, whether or not a subset holds samples of each."""
        return sorted({label for index in self.indexes for label in index.classes})

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.image_size, self.image_size

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Decoded images, shape (n, C, H, W).

        Raises:
            UserError: a damaged sample; the line names shard and key.
        """
        images = np.empty((len(indices), *self.image_shape), dtype=np.uint8)
        self.read_into(indices, images)
        return images

    def read_into(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        """The same into an array (n, C, H, W) without gaps.

        Raises:
            UserError: a damaged sample; the line names shard and key.
        """
        spans = self.spans[indices]
        self._announce(spans)
        done = self._read_raw(indices, spans, images)
        for row in np.flatnonzero(~done).tolist():  # encoded images, and raw ones that are not as they should be
            images[row] = self._decode(int(indices[row]))

    def _announce(self, spans: NDArray[np.int64]) -> None:
        """Say what will be read, so that a cold disk or a network file system serves it all at once."""
        for file, part in self._by_file(np.arange(len(spans)), spans):
            # What is wrong with a file is for the read itself to find and name.
            with suppress(OSError), file.pool.opened(file.path) as descriptor:
                for _, _, first, size in part:
                    os.posix_fadvise(descriptor, first, size, os.POSIX_FADV_WILLNEED)

    def _read_raw(
        self, indices: NDArray[np.int64], spans: NDArray[np.int64], images: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Read raw images to their places; which rows (n,) that made whole.

        The headers go to a place of their own and are compared all at once: beside the reads there is no work per byte
        in Python, and each byte is copied once.
        """
        assert images.flags.c_contiguous, "rows are filled as runs of bytes"
        header, pixels = raw_header(self.image_shape), math.prod(self.image_shape)
        fit = (self.formats[indices] == IMAGE_EXTENSIONS.index(RAW_EXTENSION)) & (spans[:, 2] == len(header) + pixels)
        headers = np.zeros((len(indices), len(header)), dtype=np.uint8)
        head, body = headers.reshape(-1).data, images.reshape(-1).data
        sizes = np.zeros(len(indices), dtype=np.int64)
        for file, part in self._by_file(np.flatnonzero(fit), spans):
            with suppress(OSError), file.pool.opened(file.path) as descriptor:
                for row, _, first, _ in part:
                    places = [
                        head[row * len(header) : (row + 1) * len(header)],
                        body[row * pixels : (row + 1) * pixels],
                    ]
                    sizes[row] = os.preadv(descriptor, places, first)
        return fit & (sizes == spans[:, 2]) & (headers == np.frombuffer(header, dtype=np.uint8)).all(axis=1)

    def _by_file(
        self, rows: NDArray[np.int64], spans: NDArray[np.int64]
    ) -> Iterator[tuple[_File, Iterator[tuple[int, int, int, int]]]]:
        """Each file, and what is wanted of it in the order of offsets: row, number of the file, first byte, size."""
        rows = rows[np.lexsort((spans[rows, 1], spans[rows, 0]))]
        wanted = zip(rows.tolist(), *spans[rows].T.tolist(), strict=True)
        for number, part in groupby(wanted, key=itemgetter(1)):
            yield self.files[number], part

    def _decode(self, index: int) -> NDArray[np.uint8]:
        """One image (C, H, W). Raises UserError, naming shard and key."""
        data = self.read_bytes(index)
        try:
            return decode_image(data, self.extension(index), self.image_size, self.channels)
        except UserError as error:
            raise UserError(f"{self.place(index)}: {error}; {KEY}") from None

    def extension(self, index: int) -> str:
        """The extension of a sample's image."""
        return IMAGE_EXTENSIONS[self.formats[index]]

    def read_bytes(self, index: int) -> bytes:
        """The image of one sample as it is stored."""
        number, first, size = (int(value) for value in self.spans[index])
        file = self.files[number]
        try:
            data = file.pool.read(file.path, first, size)
        except OSError as error:
            raise UserError(f"{self.place(index)}: unreadable ({error.strerror}); {KEY}") from None
        if len(data) != size:
            raise UserError(f"{self.place(index)}: the shard ends within it; {KEY}")
        return data

    def place(self, index: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.files[int(self.spans[index, 0])].name}: sample {self.sample_keys[index]}"

    def fetch_ahead(self) -> None:
        """Begin to fetch shards that lie in a store; files are where they are."""
        for pool in self._pools():
            pool.fetch_ahead()

    def interrupt(self) -> None:
        """End all waiting for a store; nothing is read from it any more."""
        for pool in self._pools():
            pool.interrupt()

    def _pools(self) -> list[ShardFiles]:
        return list({id(file.pool): file.pool for file in self.files}.values())


def open_directory(directory: Path, index: SplitIndex, verify: Verify, pool: ShardFiles) -> TaskData:
    """The samples of one index, whose shards lie in `directory`.

    Raises:
        UserError: a shard that is missing or damaged, or a sample without one image.
    """
    try:
        pool.check(directory, index, verify)
        for entry in index.shards:
            _check_labels(directory / entry.name, entry, index)
        formats, spans = _locate(directory, index)
    except UserError as error:
        raise UserError(f"{error}; {KEY}") from None
    sample_keys = [key for entry in index.shards for key in entry.keys]
    return TaskData(
        indexes=[replace(index, shards=[])],  # a million small lists are a burden to every collection of garbage
        image_size=index.image_size,
        channels=index.channels,
        sample_keys=sample_keys,
        labels=np.array([label for entry in index.shards for label in entry.labels], dtype=np.int64),
        keys=hash_keys(f"{index.split}/{index.task}/{key}" for key in sample_keys),
        spans=spans,
        formats=formats,
        files=[_File(directory / entry.name, pool) for entry in index.shards],
    )


def _read_task(root: Path, card: DatasetCard, split: str, task: int) -> SplitIndex:
    if not 1 <= task <= len(card.tasks):
        raise UserError(f"{root}: task {task} is not built, the data set has {len(card.tasks)}")
    directory = task_directory(root, split, task)
    index = read_index(directory)
    found = (index.task, index.split, index.classes, index.image_size, index.channels)
    if found != (task, split, card.tasks[task - 1], card.image_size, card.channels):
        raise UserError(f"{directory}: task, split, classes or image shape are not those of {root}/dataset.json")
    if not index.count:
        raise UserError(f"{directory}: holds no sample")
    return index


def _check_labels(path: Path, entry: ShardEntry, index: SplitIndex) -> None:
    if len(entry.labels) != entry.count:
        raise UserError(f"{path}: the index has no labels for it")
    strangers = set(entry.labels) - set(index.classes)
    if strangers:
        raise UserError(f"{path}: classes {one_line(sorted(strangers))} are not of task {index.task}")


def _locate(directory: Path, index: SplitIndex) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    numbers = {extension: number for number, extension in enumerate(IMAGE_EXTENSIONS)}
    formats: list[int] = []
    spans: list[tuple[int, int, int]] = []
    for number, entry in enumerate(index.shards):
        for key, members in zip(entry.keys, entry.offsets, strict=True):
            extension = image_extension(members)
            if extension is None:
                found = one_line(sorted(members))
                raise UserError(f"{directory / entry.name}: sample {key}: members {found} hold not one image")
            first, size = members[extension]
            formats.append(numbers[extension])
            spans.append((number, first, size))
    return np.array(formats, dtype=np.uint8), np.array(spans, dtype=np.int64).reshape(-1, 3)
