"""Task shards, their indexes and cards, damaged in every way: refused by name, or read as they were."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.fuzz.mutate import amount, byte_mutants, settled, tree_mutants
from trainer.config import Verify
from trainer.data.buffer import open_buffers, save_buffer, select
from trainer.data.dataset import TaskData
from trainer.data.images import decode_image
from trainer.data.shards import (
    DATASET_NAME,
    INDEX_NAME,
    DatasetCard,
    Sample,
    ShardEntry,
    SplitIndex,
    read_card,
    read_index,
    sha256_file,
    task_directory,
    write_card,
    write_index,
    write_shard,
)

SIZE, COUNT = 6, 5
LABELS = [0, 1, 0, 1, 1]
FORMATS = {"png": ("PNG", {}), "jpg": ("JPEG", {}), "webp": ("WEBP", {"lossless": True})}


def member(image_CHW: Any, extension: str) -> bytes:
    buffer = io.BytesIO()
    if extension == "npy":
        np.save(buffer, image_CHW)
    else:
        pixels = image_CHW[0] if len(image_CHW) == 1 else np.ascontiguousarray(image_CHW.transpose(1, 2, 0))
        name, options = FORMATS[extension]
        Image.fromarray(pixels).save(buffer, name, **options)
    return buffer.getvalue()


def make(root: Path, extension: str) -> Path:
    """A data set of one task in one shard; its directory of training shards."""
    channels = 1 if extension in ("png", "npy") else 3
    images = np.random.default_rng(0).integers(0, 256, (COUNT, channels, SIZE, SIZE), dtype=np.uint8)
    directory = task_directory(root, "train", 1)
    samples = [
        Sample(f"train-{row:06d}", {extension: member(images[row], extension), "cls": str(LABELS[row]).encode()})
        for row in range(COUNT)
    ]
    shard = write_shard(directory / "train-01-00000.tar", samples, LABELS)
    write_index(directory, SplitIndex("tiny", "train", 1, SIZE, channels, "png", [0, 1], [shard], ["a", "b"]))
    write_card(root, DatasetCard("tiny", SIZE, channels, "png", ["a", "b"], [[0, 1]]))
    return directory


Read = tuple[Any, list[int]]


def read(root: Path, verify: Verify) -> Read | None:
    """Images and labels of the task; None where something refused."""

    def all_of_it() -> Read:
        data = TaskData.open(root, "train", [1], verify)
        return data.read(np.arange(len(data))), data.labels.tolist()

    return settled(all_of_it, str(root))


def assert_same(found: Read | None, whole: Read) -> None:
    assert found is None or (np.array_equal(found[0], whole[0]) and found[1] == whole[1])


def seal(directory: Path, path: Path) -> None:
    """Make the index vouch for a shard's bytes, as somebody who forges both would."""
    index = json.loads((directory / INDEX_NAME).read_bytes())
    index["shards"][0].update(bytes=path.stat().st_size, sha256=sha256_file(path))
    (directory / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("extension", ["png", "npy", "jpg", "webp"])
@amount(250)
def test_bytes_of_a_shard(tmp_path: Path, extension: str, count: int) -> None:
    directory = make(tmp_path, extension)
    path, index = directory / "train-01-00000.tar", (directory / INDEX_NAME).read_bytes()
    whole = read(tmp_path, Verify.sha256)
    assert whole is not None
    shape, original, decoded = whole[0].shape, path.read_bytes(), 0
    for data in byte_mutants(original, count, seed=1):
        path.write_bytes(data)
        found = read(tmp_path, Verify.sha256)
        assert found is None or data == original
        for trust in (lambda: None, lambda: seal(directory, path)):
            trust()
            found = read(tmp_path, Verify.size)
            assert found is None or (found[0].shape, found[0].dtype, found[1]) == (shape, np.uint8, whole[1])
            decoded += found is not None
        (directory / INDEX_NAME).write_bytes(index)
    assert 0.02 < decoded / (2 * count) < 0.95


@pytest.mark.parametrize("extension", ["png", "jpg", "webp", "npy"])
@amount(400)
def test_bytes_of_an_image(extension: str, count: int) -> None:
    channels = 1 if extension in ("png", "npy") else 3
    image = np.random.default_rng(1).integers(0, 256, (channels, 16, 16), dtype=np.uint8)
    decoded = 0
    for data in byte_mutants(member(image, extension), count, seed=2):
        found = settled(lambda data=data: decode_image(data, extension, 16, channels), "")
        decoded += found is not None
        assert found is None or (found.shape == image.shape and found.dtype == np.uint8)
    assert 0.01 < decoded / count < 0.95


def mutants_of(path: Path, count: int) -> Iterator[bytes]:
    """Changed bytes, and changed structure."""
    original = path.read_bytes()
    yield from byte_mutants(original, count // 2, seed=3)
    for tree in tree_mutants(json.loads(original), count // 2, seed=4):
        yield json.dumps(tree).encode()


@pytest.mark.parametrize(("name", "reader"), [(INDEX_NAME, read_index), (DATASET_NAME, read_card)])
@amount(1000)
def test_an_index_and_a_card(tmp_path: Path, name: str, reader: Callable[[Path], Any], count: int) -> None:
    directory = make(tmp_path, "png")
    path = (directory if name == INDEX_NAME else tmp_path) / name
    whole, original = read(tmp_path, Verify.sha256), path.read_bytes()
    assert whole is not None
    accepted = 0
    for data in mutants_of(path, count):
        path.write_bytes(data)
        content = settled(lambda: reader(path.parent), str(path))
        if content is not None:
            accepted += 1
            assert json.loads(json.dumps(asdict(content))) == asdict(content)
            checked, trusted = read(tmp_path, Verify.sha256), read(tmp_path, Verify.size)
            assert trusted is None or trusted[0].dtype == np.uint8
            if says_the_same(content):
                assert_same(checked, whole)
                assert_same(trusted, whole)
        else:
            assert read(tmp_path, Verify.size) is None
    path.write_bytes(original)
    assert_same(read(tmp_path, Verify.sha256), whole)
    assert 0.02 < accepted / count < 0.9


def says_the_same(content: DatasetCard | SplitIndex) -> bool:
    """Whether it still says which image has which label: of that nothing else could tell the truth."""
    if isinstance(content, DatasetCard):
        return True
    entries: list[ShardEntry] = content.shards
    spans = {tuple(spans["png"]) for entry in entries for spans in entry.offsets if "png" in spans}
    return [entry.labels for entry in entries] == [LABELS] and len(spans) == COUNT


@amount(200)
def test_buffers(tmp_path: Path, count: int) -> None:
    make(tmp_path, "png")
    directory = tmp_path / "buffer"
    data = TaskData.open(tmp_path, "train", [1], Verify.size)
    save_buffer(data, select(data, 2, seed=0, task=1), directory)

    def all_of_it() -> Read:
        data = open_buffers([directory], Verify.sha256)
        return data.read(np.arange(len(data))), data.labels.tolist()

    kept = {path.name: path.read_bytes() for path in directory.iterdir()}
    for name, original in kept.items():
        for data in mutants_of(directory / name, count) if name == INDEX_NAME else byte_mutants(original, count, 5):
            (directory / name).write_bytes(data)
            found = settled(all_of_it, str(directory))
            assert found is None or found[0].shape[1:] == (1, SIZE, SIZE)
        (directory / name).write_bytes(original)
    shutil.rmtree(directory)
    assert settled(all_of_it, str(directory)) is None
