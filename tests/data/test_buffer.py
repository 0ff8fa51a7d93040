"""Buffers of real images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trainer.config import Buffer, MethodConfig, Verify
from trainer.data.buffer import choose, open_buffers, reservoir, save_buffer, select
from trainer.data.dataset import TaskData
from trainer.errors import UserError


def _open(root: Path, task: int = 1) -> TaskData:
    return TaskData.open(root, "train", [task], Verify.size)


def save(data: TaskData, per_class: int, directory: Path) -> None:
    method = MethodConfig(buffer_per_class=per_class)
    save_buffer(data, choose(data, method, 0, data.indexes[0].task), directory)


def test_a_buffer_holds_the_same_number_of_each_class_unchanged(make_dataset: Any, tmp_path: Path) -> None:
    root = make_dataset(3).root
    for task in (1, 2):
        save(_open(root, task), 4, tmp_path / str(task))
    buffer = open_buffers([tmp_path / "1", tmp_path / "2"], Verify.sha256)
    assert Counter(buffer.labels.tolist()) == {0: 4, 1: 4, 2: 4, 3: 4} and buffer.classes == [0, 1, 2, 3]
    original = TaskData.open(root, "train", [1, 2], Verify.size)
    where = {int(key): position for position, key in enumerate(original.keys)}
    positions = np.array([where[int(key)] for key in buffer.keys])  # keys are the original ones
    assert np.array_equal(buffer.read(np.arange(16)), original.read(positions))
    assert buffer.labels.tolist() == original.labels[positions].tolist()


def test_selection_is_a_function_of_seed_task_and_keys_alone(make_dataset: Any) -> None:
    data = _open(make_dataset().root)
    chosen = data.keys[select(data, 5, seed=1, task=1)]
    shuffled = data.subset(np.random.default_rng(0).permutation(len(data)))
    assert np.array_equal(shuffled.keys[select(shuffled, 5, seed=1, task=1)], chosen)
    for seed, task in ((2, 1), (1, 2)):
        assert set(data.keys[select(data, 5, seed=seed, task=task)].tolist()) != set(chosen.tolist())
    assert set(data.keys[select(data, 3, seed=1, task=1)].tolist()) <= set(chosen.tolist())  # smaller ones are nested


def test_selection_is_uniform(make_dataset: Any) -> None:
    """Over seeds each of 10 samples of a class is kept equally often: chi-square, 9 degrees of freedom, p = 0.001."""
    data = _open(make_dataset().root)
    kept = Counter(int(index) for seed in range(500) for index in select(data, 2, seed, 1) if data.labels[index] == 0)
    counts = np.array([kept[int(index)] for index in np.flatnonzero(data.labels == 0)])
    assert counts.sum() == 1000 and ((counts - 100) ** 2 / 100).sum() < 27.9


def test_every_image_of_the_stream_is_equally_likely_in_the_reservoir(make_dataset: Any) -> None:
    """Over seeds, of two tasks: chi-square with as many degrees of freedom as images less one, p = 0.001."""
    data = TaskData.open(make_dataset().root, "train", [1, 2], Verify.size)
    kept = np.bincount(np.concatenate([reservoir(data, 8, seed) for seed in range(1000)]), minlength=len(data))
    expected = 8000 / len(data)
    assert len(data) == 40 and ((kept - expected) ** 2 / expected).sum() < 72.1


def test_a_reservoir_kept_task_by_task_is_that_of_all_images(make_dataset: Any, tmp_path: Path) -> None:
    root = make_dataset().root
    method = MethodConfig(buffer=Buffer.reservoir, buffer_size=9)
    for task in (1, 2):
        data = _open(root, task)
        save_buffer(data, choose(data, method, 5, task), tmp_path / str(task))
    first = open_buffers([tmp_path / "1"], Verify.sha256)
    assert len(first) == 9
    both = open_buffers([tmp_path / "1", tmp_path / "2"], Verify.sha256)
    found = both.subset(reservoir(both, 9, 5))
    everything = TaskData.open(root, "train", [1, 2], Verify.size)
    shuffled = everything.subset(np.random.default_rng(0).permutation(len(everything)))
    expected = shuffled.subset(reservoir(shuffled, 9, 5))
    assert found.keys.tolist() == expected.keys.tolist(), "the same, in the same order"
    assert np.array_equal(found.read(np.arange(9)), expected.read(np.arange(9)))
    old = set(first.keys.tolist())
    assert 0 < len(old & set(found.keys.tolist())) < 9, "later images take the place of some"


def test_a_small_class_is_kept_whole(make_dataset: Any) -> None:
    data = _open(make_dataset().root)
    assert sorted(select(data, 1000, 0, 1).tolist()) == list(range(20))
    assert len(select(data, 0, 0, 1)) == 0


def test_saving_again_gives_the_same_bytes(make_dataset: Any, tmp_path: Path) -> None:
    data = _open(make_dataset().root)
    for name in ("a", "b", "a"):
        save(data, 3, tmp_path / name)
    assert [(tmp_path / "a" / file).read_bytes() for file in ("buffer.tar", "index.json")] == [
        (tmp_path / "b" / file).read_bytes() for file in ("buffer.tar", "index.json")
    ]


def test_a_missing_or_damaged_buffer_is_named(make_dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/index\.json: missing; key data\.root"):
        open_buffers([tmp_path / "none"], Verify.size)
    save(_open(make_dataset().root), 3, tmp_path / "a")
    shard = tmp_path / "a" / "buffer.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"buffer\.tar: corrupt"):
        open_buffers([tmp_path / "a"], Verify.sha256)


def test_a_directory_that_cannot_be_written_is_named(make_dataset: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/buffer: cannot be written.*key run\.dir"):
        save(_open(make_dataset().root), 3, tmp_path / "file" / "buffer")
