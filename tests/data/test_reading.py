"""Reading many samples at once: against tarfile, numpy and Pillow, damaged in every way, and from several threads."""

from __future__ import annotations

import io
import os
import resource
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from tests.data.conftest import member
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.files import FilePool, open_files_limit
from trainer.data.shards import DatasetCard, Sample, SplitIndex, task_directory, write_card, write_index, write_shard
from trainer.data.stream import RealStream
from trainer.errors import UserError

SIZE, COUNT, SHARD = 5, 23, 6
MIXED = ("npy", "png", "npy", "webp", "npy", "npy", "png")


def make(root: Path, extensions: tuple[str, ...]) -> TaskData:
    """Colour images of the given extensions in turn, in shards of six."""
    images = np.random.default_rng(1).integers(0, 256, (COUNT, 3, SIZE, SIZE), dtype=np.uint8)
    directory, shards = task_directory(root, "train", 1), []
    for start in range(0, COUNT, SHARD):
        samples: list[Sample] = []
        for row in range(start, min(start + SHARD, COUNT)):
            extension = extensions[row % len(extensions)]
            samples.append(Sample(f"train-{row:06d}", {"cls": b"0", extension: member(images[row], extension)}))
        shards.append(write_shard(directory / f"{len(shards):05d}.tar", samples, [0] * len(samples)))
    write_index(directory, SplitIndex("mixed", "train", 1, SIZE, 3, "raw", [0], shards))
    write_card(root, DatasetCard("mixed", SIZE, 3, "raw", ["zero"], [[0]]))
    return TaskData.open(root, "train", [1], Verify.size)


def by_hand(root: Path) -> NDArray[np.uint8]:
    """All images in the order of their keys, by tarfile, numpy and Pillow."""
    found: dict[str, NDArray[np.uint8]] = {}
    for path in task_directory(root, "train", 1).glob("*.tar"):
        with tarfile.open(path) as tar:
            for info in tar:
                key, extension = info.name.split(".")
                file: Any = tar.extractfile(info)
                if extension == "npy":
                    found[key] = np.load(io.BytesIO(file.read()), allow_pickle=False)
                elif extension != "cls":
                    found[key] = np.asarray(Image.open(io.BytesIO(file.read()))).transpose(2, 0, 1)
    return np.stack([found[key] for key in sorted(found)])


@pytest.mark.parametrize("extensions", [("npy",), ("png",), ("jpg",), MIXED])
def test_any_samples_in_any_order_are_those_of_the_tars(tmp_path: Path, extensions: tuple[str, ...]) -> None:
    data, images = make(tmp_path, extensions), by_hand(tmp_path)
    random = np.random.default_rng(2)
    for indices in (np.arange(COUNT), random.permutation(COUNT), random.integers(0, COUNT, 100), np.arange(0)):
        read = data.read(indices)
        assert read.dtype == np.uint8 and np.array_equal(read, images[indices])


def test_images_are_read_to_where_they_belong(tmp_path: Path) -> None:
    data, images = make(tmp_path, MIXED), by_hand(tmp_path)
    room = np.full((8, 3, SIZE, SIZE), 7, dtype=np.uint8)
    data.read_into(np.array([22, 3, 11]), room[2:5])
    assert np.array_equal(room[2:5], images[[22, 3, 11]])
    assert (room[:2] == 7).all() and (room[5:] == 7).all()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def vanish(path: Path, first: int, size: int) -> None:
    path.unlink()


def become_a_directory(path: Path, first: int, size: int) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path, first, size: overwrite(path, first, b"\x94"), r"not a \.npy file of uint8"),
        (lambda path, first, size: overwrite(path, first + 60, b"7"), r"not a \.npy file of uint8"),
        (lambda path, first, size: overwrite(path, first, bytes(size)), r"not a \.npy file of uint8"),
        (lambda path, first, size: os.truncate(path, first + size - 1), "the shard ends within it"),
        (lambda path, first, size: os.truncate(path, first + 10), "the shard ends within it"),
        (lambda path, first, size: os.truncate(path, 0), "the shard ends within it"),
        (vanish, "unreadable"),
        (become_a_directory, "unreadable"),
    ],
)
def test_a_damaged_raw_image_is_named_among_many(
    tmp_path: Path, damage: Callable[[Path, int, int], None], message: str
) -> None:
    data, images = make(tmp_path, ("npy",)), by_hand(tmp_path)
    bad = 2 * SHARD + SHARD - 1  # the last of its shard
    number, first, size = data.spans[bad].tolist()
    damage(data.files[number].path, first, size)
    others = np.array([index for index in range(COUNT) if data.spans[index, 0] != number])
    assert np.array_equal(data.read(others), images[others])
    with pytest.raises(UserError) as caught:
        data.read(np.concatenate([others, [bad]]))
    text = str(caught.value)
    assert f"0000{number}.tar: sample train-{bad:06d}: " in text and text.endswith("key data.root")
    assert len(text.splitlines()) == 1
    with pytest.raises(UserError, match=message):
        data.read(np.array([bad]))


@pytest.mark.parametrize("other", [np.zeros((3, SIZE, SIZE), np.int8), np.zeros((3, SIZE, SIZE + 1), np.uint8)])
def test_an_array_of_another_kind_is_named(tmp_path: Path, other: NDArray[Any]) -> None:
    """Of the right size but another header, and of another size."""
    directory = task_directory(tmp_path, "train", 1)
    buffer = io.BytesIO()
    np.save(buffer, other)
    good = member(np.zeros((3, SIZE, SIZE), np.uint8), "npy")
    samples = [Sample("a", {"npy": good, "cls": b"0"}), Sample("b", {"npy": buffer.getvalue(), "cls": b"0"})]
    shard = write_shard(directory / "0.tar", samples, [0, 0])
    write_index(directory, SplitIndex("odd", "train", 1, SIZE, 3, "raw", [0], [shard]))
    write_card(tmp_path, DatasetCard("odd", SIZE, 3, "raw", ["zero"], [[0]]))
    data = TaskData.open(tmp_path, "train", [1], Verify.sha256)
    assert not data.read(np.array([0])).any()
    with pytest.raises(UserError, match=r"0\.tar: sample b: .*\.npy file"):
        data.read(np.array([0, 1]))


@pytest.mark.parametrize("extensions", [("npy",), MIXED])
def test_threads_read_the_same(tmp_path: Path, extensions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with fewer descriptors than shards, so that files are closed and opened again all the time."""
    monkeypatch.setattr("trainer.data.files.open_files_limit", lambda: 1)
    data, images, wrong = make(tmp_path, extensions), by_hand(tmp_path), []

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(30):
            indices = random.integers(0, COUNT, 16)
            if not np.array_equal(data.read(indices), images[indices]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("workers", [1, 3])
def test_a_stream_of_raw_images_keeps_the_order(tmp_path: Path, workers: int) -> None:
    data, images = make(tmp_path, ("npy",)), by_hand(tmp_path)
    place = {int(key): row for row, key in enumerate(data.keys)}
    options: dict[str, Any] = {"seed": 5, "task": 1, "global_batch": 8, "start_step": 2, "stop_step": 12}
    with RealStream(data, **options, rank=0, world_size=1, workers=workers, prefetch=2) as stream:
        batches = list(stream)
    with RealStream(data, **options, rank=0, world_size=1, workers=1, prefetch=1) as stream:
        again = list(stream)
    assert len(batches) == 10
    for batch, other in zip(batches, again, strict=True):
        assert batch.keys.tolist() == other.keys.tolist()
        assert np.array_equal(batch.images.numpy(), images[[place[int(key)] for key in batch.keys]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_batches_lie_in_page_locked_memory_and_are_not_overwritten_while_they_are_copied(tmp_path: Path) -> None:
    data, images = make(tmp_path, ("npy",)), by_hand(tmp_path)
    options: dict[str, Any] = {"seed": 5, "task": 1, "global_batch": 16, "start_step": 0, "stop_step": 200}
    copies: list[tuple[Any, torch.Tensor]] = []
    with RealStream(data, **options, rank=0, world_size=1, workers=2, prefetch=4) as stream:
        torch.cuda._sleep(10**9)  # pyright: ignore[reportPrivateUsage]  # the copies wait behind it
        for batch in stream:
            assert batch.images.is_pinned()
            copies.append((batch.keys, batch.images.to("cuda", non_blocking=True)))
    place = {int(key): row for row, key in enumerate(data.keys)}
    for keys, copy in copies:
        assert np.array_equal(copy.cpu().numpy(), images[[place[int(key)] for key in keys]])


def test_a_process_keeps_most_of_its_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, limit in ((1024, 256), (2, 1), (10**6, 4096), (resource.RLIM_INFINITY, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert open_files_limit() == limit


def test_what_was_opened_keeps_no_list_of_its_samples_members(tmp_path: Path) -> None:
    """The index of a million samples has millions of small lists: each collection of garbage would visit them all."""
    data = make(tmp_path, MIXED)
    assert [index.shards for index in data.indexes] == [[]] and data.classes == [0]
    assert FilePool().open_files == 0


@pytest.mark.parametrize("extensions", [("npy",), MIXED])
def test_all_that_a_batch_needs_is_asked_for_before_any_of_it_is_read(
    tmp_path: Path, extensions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a cold disk serves it at once, not one image after another."""
    data, calls = make(tmp_path, extensions), list[tuple[str, int]]()

    def note(name: str, offset: int) -> None:
        real = getattr(os, name)

        def noted(*arguments: Any) -> Any:
            calls.append((name, arguments[offset]))
            return real(*arguments)

        monkeypatch.setattr(os, name, noted)

    for name, offset in (("posix_fadvise", 1), ("preadv", 2), ("pread", 2)):
        note(name, offset)
    indices = np.array([20, 3, 17, 4, 9])
    data.read(indices)
    first = sorted(data.spans[indices, 1].tolist())
    assert sorted(offset for name, offset in calls[:5] if name == "posix_fadvise") == first
    assert sorted(offset for name, offset in calls[5:] if name != "posix_fadvise") == first and len(calls) == 10
