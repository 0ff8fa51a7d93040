"""Streams: what a step sees depends on neither ranks nor workers, and nothing hangs."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.stream import HostBatch, RealStream
from trainer.errors import ConfigError, UserError


class Numbers:
    """Images that hold their own index; reading may be slow or fail."""

    image_shape = (1, 1, 1)

    def __init__(self, count: int, fail_at: int = -1, delay: float = 0.0) -> None:
        self.labels = np.arange(count, dtype=np.int64) % 5
        self.keys = np.arange(count, dtype=np.uint64) + np.uint64(2**63)
        self.fail_at, self.delay, self.reads = fail_at, delay, 0

    def __len__(self) -> int:
        return len(self.labels)

    def read_into(self, indices: NDArray[np.int64], images: NDArray[np.uint8]) -> None:
        self.reads += 1
        time.sleep(self.delay)
        if self.fail_at in indices:
            raise UserError("shard 7: sample x: broken")
        images[:] = (indices % 256).astype(np.uint8).reshape(-1, 1, 1, 1)


def stream(data: Any, **changes: Any) -> RealStream:
    options: dict[str, Any] = {"seed": 3, "task": 2, "global_batch": 12, "rank": 0, "world_size": 1}
    options |= {"start_step": 0, "stop_step": 9, "workers": 2, "prefetch": 3}
    return RealStream(data, **(options | changes))


def batches(data: Any, **changes: Any) -> list[HostBatch]:
    with stream(data, **changes) as opened:
        return list(opened)


def content(batch: HostBatch) -> list[tuple[int, int, int, int]]:
    pixels = batch.images.flatten(1)[:, 0].tolist()
    return list(zip(pixels, batch.labels.tolist(), batch.keys.tolist(), batch.draws.tolist(), strict=True))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 60),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 12]),
    workers=st.integers(1, 4),
    prefetch=st.integers(1, 6),
    start=st.integers(0, 9),
)
def test_a_step_is_the_same_for_any_ranks_workers_and_start(
    count: int, world_size: int, workers: int, prefetch: int, start: int
) -> None:
    data = Numbers(count)
    whole = [content(batch) for batch in batches(data, workers=1, prefetch=1)]
    options = {"workers": workers, "prefetch": prefetch, "world_size": world_size, "start_step": start}
    ranks = [[content(batch) for batch in batches(data, rank=rank, **options)] for rank in range(world_size)]
    union = [[sample for share in step for sample in share] for step in zip(*ranks, strict=True)]
    assert union == whole[start:]


def test_each_epoch_shows_every_sample_once_and_draws_count_epochs() -> None:
    samples = [sample for batch in batches(Numbers(27)) for sample in content(batch)]  # 9 x 12 = 4 epochs of 27
    for epoch in range(4):
        part = samples[epoch * 27 : (epoch + 1) * 27]
        assert sorted(pixel for pixel, *_ in part) == list(range(27))
        assert {draw for *_, draw in part} == {epoch}


def test_images_come_from_the_data_set(make_dataset: Any) -> None:
    known = make_dataset(3)
    data = TaskData.open(known.root, "train", [1, 2], Verify.size)
    images = {int(key): image for key, image in zip(data.keys, data.read(np.arange(len(data))), strict=True)}
    for batch in batches(data):
        assert batch.images.shape == (12, 3, 6, 6) and len(batch) == 12
        for key, image in zip(batch.keys, batch.images.numpy(), strict=True):
            assert np.array_equal(images[int(key)], image)


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_no_thread_is_left_when_the_consumer_stops_early() -> None:
    data = Numbers(100, delay=0.01)
    with stream(data, stop_step=10**6, workers=3, prefetch=8) as opened:
        next(opened)
        assert readers()
    assert not readers() and data.reads < 20
    with pytest.raises(RuntimeError, match="closed"):
        next(opened)


def test_reading_ahead_is_bounded() -> None:
    data = Numbers(100)
    with stream(data, stop_step=10**6, workers=2, prefetch=5) as opened:
        next(opened)
        deadline = time.monotonic() + 20
        while data.reads < 1 + 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert data.reads == 1 + 5


def test_an_error_in_a_thread_ends_the_run_at_its_step() -> None:
    data = Numbers(60)
    bad = int(np.flatnonzero(data.keys == batches(data)[4].keys[3])[0])
    with stream(Numbers(60, fail_at=bad), prefetch=8) as opened:
        for _ in range(4):
            next(opened)
        with pytest.raises(UserError, match="sample x: broken"):
            next(opened)
        assert not readers()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"world_size": 5}, "train.global_batch=12"),
        ({"global_batch": 0}, "train.global_batch=0"),
        ({"workers": 0}, "data.workers=0"),
        ({"prefetch": 0}, "data.prefetch=0"),
    ],
)
def test_impossible_streams_are_refused_by_key(changes: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        stream(Numbers(10), **changes)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(UserError, match=r"no sample; key data\.root"):
        stream(Numbers(0))
