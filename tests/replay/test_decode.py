"""Decoding replay shards and gathering points: against tarfile, json and numpy."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from trainer.config import Points
from trainer.replay.decode import Corrupt, decode
from trainer.replay.draws import locate
from trainer.replay.points import gather
from trainer.replay.pool import encode
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch


def shard_of(request: ReplayRequest, shard: int, longest: bool = False) -> bytes:
    """A shard of random numbers. `longest`: the records are of very different lengths."""
    random = torch.Generator().manual_seed(shard)
    count, points, shape = request.shard_trajectories, request.points_per_trajectory, request.image_shape
    first = shard * count
    wide = 2**62 if not longest else 1
    seeds = torch.randint(-wide, wide, (count, points), generator=random)
    if longest:
        seeds[1::3] = 2**62
    batch = TrajectoryBatch(
        indices=np.arange(first, first + count),
        label=torch.tensor(request.classes)[torch.randint(0, len(request.classes), (count,), generator=random)],
        start_seeds=torch.randint(-(2**62), 2**62, (count,), generator=random),
        t=torch.randint(0, request.timesteps, (count, points), generator=random),
        seeds=seeds,
        end=torch.randn((count, *shape), generator=random).half() if request.renoised_points else None,
        states=torch.randn((count, request.path_points, *shape), generator=random).half()
        if request.path_points
        else None,
        targets=torch.randn((count, points, *shape), generator=random).half() if request.teacher_targets else None,
        evaluations=0,
    )
    return encode(request, shard, [batch])[1]


def by_hand(data: bytes) -> tuple[list[dict[str, Any]], dict[str, list[Any]]]:
    """Records and arrays in the order of the tar."""
    records: list[dict[str, Any]] = []
    arrays: dict[str, list[Any]] = {}
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for info in tar:
            _, _, name = info.name.partition(".")
            file: Any = tar.extractfile(info)
            if name == "json":
                records.append(json.loads(file.read()))
            else:
                arrays.setdefault(name, []).append(np.load(io.BytesIO(file.read()), allow_pickle=False))
    return records, arrays


@pytest.fixture(params=list(Points))
def request_(request: pytest.FixtureRequest, make_workplace: Any) -> ReplayRequest:
    return make_workplace(points=request.param, points_per_trajectory=3).request


MEMBERS = {
    "renoised": {"end.npy", "targets.npy"},
    "trajectory": {"states.npy", "targets.npy"},
    "both": {"end.npy", "states.npy", "targets.npy"},
}


@pytest.mark.parametrize("longest", [False, True])
def test_a_shard_is_what_its_tar_holds(request_: ReplayRequest, longest: bool) -> None:
    """Whether or not its members lie at equal distances."""
    request = replace(request_, points_per_trajectory=40 if longest else 3)  # so that records differ by whole blocks
    data = shard_of(request, 2, longest)
    decoded = decode(request, 2, data)
    records, arrays = by_hand(data)
    lengths = {len(json.dumps(record, separators=(",", ":"))) // 512 for record in records}
    assert len(lengths) == (2 if longest else 1)
    whole = np.frombuffer(data, dtype=np.uint8)
    assert decoded.label.tolist() == [record["label"] for record in records]
    assert decoded.t.tolist() == [record["timesteps"] for record in records]
    assert decoded.seeds.tolist() == [record["seeds"] for record in records]
    found = {"end.npy": decoded.end, "states.npy": decoded.states, "targets.npy": decoded.targets}
    assert {name for name, array in found.items() if array is not None} == arrays.keys() == MEMBERS[request.points]
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
        assert np.shares_memory(found[name], whole) is not longest


def test_a_shard_of_one_trajectory(request_: ReplayRequest) -> None:
    request = replace(request_, shard_trajectories=1)
    data = shard_of(request, 5)
    decoded = decode(request, 5, data)
    assert all(
        np.array_equal(getattr(decoded, name.removesuffix(".npy")), array) for name, array in by_hand(data)[1].items()
    )


def test_points_are_those_of_their_positions(request_: ReplayRequest) -> None:
    request = request_
    shards = [shard_of(request, shard) for shard in range(3)]
    found = [by_hand(data) for data in shards]
    positions = np.random.default_rng(0).permutation(3 * request.shard_points)[: 2 * request.shard_points]
    numbers, trajectories, points = locate(request, positions)
    parts = []
    for number, data in enumerate(shards):
        places = np.flatnonzero(numbers == number)
        inside = trajectories[places] - number * request.shard_trajectories
        parts.append((places, decode(request, number, data), inside, points[places]))
    stored = gather(request, parts, len(positions))
    assert stored.targets is not None
    for place, (number, trajectory, point) in enumerate(zip(numbers, trajectories, points, strict=True)):
        records, arrays = found[number]
        row = trajectory - number * request.shard_trajectories
        record = records[row]
        assert record["trajectory"] == trajectory and int(stored.label[place]) == record["label"]
        assert int(stored.t[place]) == record["timesteps"][point]
        assert int(stored.seeds[place]) == record["seeds"][point]
        state = {"renoised": False, "trajectory": True, "both": point < 2}[request.points]  # of 3 points
        image = arrays["states.npy"][row][point] if state else arrays["end.npy"][row]
        assert stored.on_path is None or (request.points == "both" and bool(stored.on_path[place]) == state)
        assert np.array_equal(stored.images[place].numpy(), image)
        assert np.array_equal(stored.targets[place].numpy(), arrays["targets.npy"][row][point])


def test_points_without_targets(make_workplace: Any) -> None:
    request = replace(make_workplace().request, targets="noise")
    decoded = decode(request, 0, shard_of(request, 0))
    everything = np.arange(request.shard_trajectories)
    stored = gather(request, [(everything, decoded, everything, everything * 0)], len(everything))
    assert decoded.targets is None and stored.targets is None and stored.images.shape[1:] == request.image_shape


@pytest.mark.parametrize("cut", [1, 511, 2000, 20_000])
def test_a_shard_that_ends_early_is_corrupt(request_: ReplayRequest, cut: int) -> None:
    data = shard_of(request_, 0)
    assert len(data) > 20_000
    end = data.rstrip(b"\0")  # a tar ends with zeros, of which nobody misses some
    with pytest.raises(Corrupt):
        decode(request_, 0, end[:-cut])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_points_for_a_gpu_lie_in_page_locked_memory(request_: ReplayRequest) -> None:
    decoded = decode(request_, 0, shard_of(request_, 0))
    one = np.zeros(1, dtype=np.int64)
    stored = gather(request_, [(one, decoded, one, one)], 1, pin=True)
    assert stored.targets is not None
    parts = (stored.images, stored.targets, stored.t, stored.seeds, stored.label, stored.on_path)
    assert all(part.is_pinned() for part in parts if part is not None)
