"""Reading task shards."""

from __future__ import annotations

import json
import os
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from webdataset.compat import WebDataset

from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.files import FilePool
from trainer.data.images import decode_image
from trainer.data.shards import task_directory
from trainer.errors import UserError
from trainer.seeds import hash_key

ALL = np.arange(20)


@pytest.mark.parametrize(("channels", "extension"), [(1, "png"), (3, "png"), (3, "webp"), (1, "npy"), (3, "npy")])
def test_images_labels_and_keys_are_those_written(make_dataset: Any, channels: int, extension: str) -> None:
    known = make_dataset(channels, extension)
    data = TaskData.open(known.root, "train", [2], Verify.sha256)
    assert len(data) == 20 and data.classes == [2, 3]
    assert np.array_equal(data.read(ALL), known.images["train", 2])
    assert data.labels.tolist() == known.labels["train", 2] and data.labels.dtype == np.int64
    assert data.sample_keys[3] == "train-000003" and data.keys.dtype == np.uint64
    assert int(data.keys[3]) == hash_key("train/2/train-000003")


def test_jpeg_members_decode_as_pillow_does(make_dataset: Any) -> None:
    data = TaskData.open(make_dataset(3, "jpg").root, "test", [1], Verify.size)
    with tarfile.open(data.files[0].path) as tar:
        jpeg: Any = tar.extractfile("test-000002.jpg")
        expected = np.asarray(Image.open(jpeg)).transpose(2, 0, 1)
    assert np.array_equal(data.read(np.array([2]))[0], expected)


def test_tasks_are_joined_in_the_order_given(make_dataset: Any) -> None:
    known = make_dataset()
    data = TaskData.open(known.root, "train", [2, 1], Verify.size)
    both = np.concatenate([known.images["train", 2], known.images["train", 1]])
    picks = np.array([39, 0, 21, 21, 5])
    assert len(data) == 40 and data.classes == [0, 1, 2, 3] and len(set(data.keys.tolist())) == 40
    assert np.array_equal(data.read(picks), both[picks])
    part = data.subset(picks)
    assert np.array_equal(part.read(np.arange(5)), both[picks])
    assert part.labels.tolist() == data.labels[picks].tolist()
    assert part.sample_keys == [data.sample_keys[pick] for pick in picks]
    again = TaskData.concat([part, data])
    assert np.array_equal(again.read(np.array([1, 5 + 39])), both[[0, 39]])


@pytest.mark.parametrize("extension", ["png", "npy"])
def test_webdataset_reads_the_same(make_dataset: Any, extension: str) -> None:
    known = make_dataset(3, extension)
    shards = [str(path) for path in sorted(task_directory(known.root, "train", 1).glob("*.tar"))]
    assert len(shards) == 3
    pipeline: Any = WebDataset(shards, shardshuffle=False).to_tuple("__key__", extension, "cls")
    read = [(key, decode_image(image, extension, 6, 3), int(label)) for key, image, label in pipeline]
    data = TaskData.open(known.root, "train", [1], Verify.size)
    assert [key for key, _, _ in read] == data.sample_keys
    assert [label for _, _, label in read] == data.labels.tolist()
    assert np.array_equal(np.stack([image for _, image, _ in read]), data.read(ALL))


def _shard(root: Path) -> Path:
    return task_directory(root, "train", 1) / "00001.tar"


def _open(root: Path, verify: Verify = Verify.sha256) -> TaskData:
    return TaskData.open(root, "train", [1], verify)


def test_a_missing_or_damaged_shard_is_named_before_work_starts(make_dataset: Any) -> None:
    root = make_dataset().root
    path = _shard(root)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"00001\.tar: corrupt.*key data\.root"):
        _open(root)
    _open(root, Verify.size)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"00001\.tar: .*expected.*key data\.root"):
        _open(root, Verify.size)
    path.unlink()
    with pytest.raises(UserError, match=r"00001\.tar: missing; key data\.root"):
        _open(root, Verify.size)


def test_a_missing_index_task_or_data_set_is_named(make_dataset: Any, tmp_path: Path) -> None:
    root = make_dataset().root
    with pytest.raises(UserError, match=r"known: task 3 is not built.*key data\.root"):
        TaskData.open(root, "train", [1, 3], Verify.size)
    (task_directory(root, "train", 1) / "index.json").unlink()
    with pytest.raises(UserError, match=r"task-01/index\.json: missing; key data\.root"):
        _open(root)
    with pytest.raises(UserError, match=r"nothing/dataset\.json: missing; key data\.root"):
        _open(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("classes", [0, 2], "are not those of"),
        ("image_size", 8, "are not those of"),
        ("split", "test", "are not those of"),
        ("task", 2, "are not those of"),
        ("shards", [], "holds no sample"),
    ],
)
def test_an_index_that_contradicts_the_card_is_refused(make_dataset: Any, field: str, value: Any, message: str) -> None:
    root = make_dataset().root
    path = task_directory(root, "train", 1) / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=rf"task-01: .*{message}.*|task-01: {message}"):
        _open(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": [0, 1, 0, 1, 0, 1, 9]}, r"classes \[9\] are not of task 1"),
        ({"labels": []}, "no labels"),
        ({"offsets": [{"cls": [0, 1]}] * 7}, "hold not one image"),
    ],
)
def test_labels_and_members_of_the_index_are_checked(make_dataset: Any, change: Any, message: str) -> None:
    root = make_dataset().root
    path = task_directory(root, "train", 1) / "index.json"
    content = json.loads(path.read_text())
    content["shards"][0].update(change)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"00000\.tar: .*{message}.*key data\.root"):
        _open(root, Verify.size)


def test_a_sample_that_is_corrupt_later_is_named(make_dataset: Any) -> None:
    root = make_dataset().root
    data = _open(root)
    path = _shard(root)
    first, size = data.spans[7 + 2][1:]
    content = bytearray(path.read_bytes())
    content[first : first + size] = bytes(size)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"00001\.tar: sample train-000009: not a readable png.*key data\.root"):
        data.read(np.array([9]))
    os.truncate(path, first)
    with pytest.raises(UserError, match=r"00001\.tar: sample train-000009: the shard ends within it"):
        data.read(np.array([9]))
    assert data.read(np.array([0])).shape == (1, 1, 6, 6)


def test_a_shard_that_vanished_is_named(make_dataset: Any) -> None:
    root = make_dataset().root
    data = _open(root)
    _shard(root).unlink()
    with pytest.raises(UserError, match=r"00001\.tar: sample train-000007: unreadable"):
        data.read(np.array([7]))


def test_data_of_other_shapes_does_not_join(make_dataset: Any) -> None:
    parts = [_open(make_dataset(channels, name=str(channels)).root) for channels in (1, 3)]
    with pytest.raises(UserError, match=r"different shapes cannot be joined; key data\.root"):
        TaskData.concat(parts)


def _descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_the_pool_reads_right_bytes_with_few_descriptors(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(12)]
    for number, path in enumerate(paths):
        path.write_bytes(bytes([number]) * 64)
    pool = FilePool(limit=2)
    wrong: list[int] = []

    def read(pool: FilePool, start: int) -> None:
        for step in range(400):
            number = (start + step * 7) % len(paths)
            if pool.read(paths[number], 10, 20) != bytes([number]) * 20:
                wrong.append(number)

    threads = [threading.Thread(target=read, args=(pool, start)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and pool.open_files <= 2
    before = _descriptors()
    del pool
    assert _descriptors() < before
