"""A small data set of known images, written with the shard schema alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from trainer.data.shards import (
    DatasetCard,
    Sample,
    SplitIndex,
    task_directory,
    write_card,
    write_index,
    write_shard,
)

TASKS = [[0, 1], [2, 3]]
SIZE = 6
SHARD = 7


@dataclass(frozen=True)
class Known:
    """Where the data set lies and what it should read as, by (split, task)."""

    root: Path
    images: dict[tuple[str, int], NDArray[np.uint8]]  # (N,C,H,W)
    labels: dict[tuple[str, int], list[int]]


def member(image_CHW: NDArray[np.uint8], extension: str) -> bytes:
    """An image's bytes, by numpy and Pillow alone."""
    buffer = io.BytesIO()
    if extension == "npy":
        np.save(buffer, image_CHW)
        return buffer.getvalue()
    pixels = image_CHW[0] if len(image_CHW) == 1 else image_CHW.transpose(1, 2, 0)
    name, options = {"png": ("PNG", {}), "webp": ("WEBP", {"lossless": True}), "jpg": ("JPEG", {})}[extension]
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, name, **options)
    return buffer.getvalue()


Maker = Callable[..., Known]


@pytest.fixture
def make_dataset(tmp_path: Path) -> Maker:
    def make(channels: int = 1, extension: str = "png", count: int = 20, name: str = "known") -> Known:
        root = tmp_path / name
        random = np.random.default_rng(channels)
        images: dict[tuple[str, int], NDArray[np.uint8]] = {}
        labels: dict[tuple[str, int], list[int]] = {}
        for split in ("train", "test"):
            for task, classes in enumerate(TASKS, 1):
                pixels = random.integers(0, 256, (count, channels, SIZE, SIZE), dtype=np.uint8)
                numbers = [classes[i % len(classes)] for i in range(count)]
                directory = task_directory(root, split, task)
                shards = []
                for start in range(0, count, SHARD):
                    rows = range(start, min(start + SHARD, count))
                    samples = [
                        Sample(
                            f"{split}-{row:06d}",
                            {extension: member(pixels[row], extension), "cls": str(numbers[row]).encode()},
                        )
                        for row in rows
                    ]
                    path = directory / f"{len(shards):05d}.tar"
                    shards.append(write_shard(path, samples, [numbers[row] for row in rows]))
                index = SplitIndex(name, split, task, SIZE, channels, "png", classes, shards)
                write_index(directory, index)
                images[split, task], labels[split, task] = pixels, numbers
        write_card(root, DatasetCard(name, SIZE, channels, "png", ["zero", "one", "two", "three"], TASKS))
        return Known(root, images, labels)

    return make
