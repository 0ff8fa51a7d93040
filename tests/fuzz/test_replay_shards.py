"""Replay shards of any content: corrupt, or fit to be trained on."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.fuzz.conftest import CLASSES, Workplace
from tests.fuzz.mutate import amount, byte_mutants, settled, tree_mutants
from trainer.replay.decode import Corrupt, DecodedShard, decode
from trainer.replay.request import ReplayRequest


def read(request: ReplayRequest, data: bytes) -> DecodedShard | None:
    return settled(lambda: decode(request, 0, data), "", Corrupt)


def assert_fits(shard: DecodedShard, request: ReplayRequest) -> None:
    """Whatever a decoded shard holds can be trained on: shapes, classes and timesteps are the request's."""
    count, points, shape = request.shard_trajectories, request.points_per_trajectory, request.image_shape
    assert shard.label.shape == (count,) and set(shard.label.tolist()) <= set(CLASSES)
    assert shard.t.shape == shard.seeds.shape == (count, points) and shard.t.dtype == shard.seeds.dtype == np.int64
    assert 0 <= shard.t.min() <= shard.t.max() < request.timesteps
    if request.renoised_points:
        assert shard.end is not None and shard.end.shape == (count, *shape) and shard.end.dtype == np.float16
    if request.path_points:
        assert shard.states is not None and shard.states.shape == (count, request.path_points, *shape)
    assert shard.targets is not None and shard.targets.shape == (count, points, *shape)


@amount(2500)
def test_bytes_of_a_shard(workplace: Workplace, count: int) -> None:
    original, decoded = workplace.encoded(0), 0
    for data in byte_mutants(original, count, seed=0):
        shard = read(workplace.request, data)
        if shard is not None:
            decoded += 1
            assert_fits(shard, workplace.request)
    assert 0.02 < decoded / count < 0.95


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], format: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


TYPES = (
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.FIFOTYPE,
    tarfile.CHRTYPE,
    tarfile.DIRTYPE,
    b"S",
    b"L",
    b"x",
    b"g",
    b"Z",
)


def forged(original: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Well-formed tars of the same members, with some renamed, retyped, repeated, lost or of other content."""
    rng = random.Random(seed)
    for _ in range(count):
        members: list[tuple[tarfile.TarInfo, bytes]] = []
        with tarfile.open(fileobj=io.BytesIO(original)) as tar:
            for info in tar:
                file: Any = tar.extractfile(info)
                members.append((info, file.read()))
        for _ in range(rng.choice((1, 1, 2, 4))):
            place = rng.randrange(len(members))
            info, data = members[place]
            kind = rng.randrange(7)
            if kind == 0:
                info.name = rng.choice(("../x", "/etc/passwd", "x.pkl", "a\nb", "é" * 40, "x/" * 60, info.name + " "))
            elif kind == 1:
                info.type, info.linkname = rng.choice(TYPES), "../../etc/passwd"
            elif kind == 2:
                members[place] = (info, next(byte_mutants(data, 7, rng.randrange(2**32))))
            elif kind == 3:
                del members[place]
            elif kind == 4:
                members.insert(rng.randrange(len(members)), members[place])
            elif kind == 5:
                info.pax_headers = {"size": rng.choice(("1", "-5", "x", str(10**12))), "path": info.name}
            else:
                members[place] = (info, _other_record(data, rng))
        yield tar_of(members, rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)))


def _other_record(data: bytes, rng: random.Random) -> bytes:
    if not data.startswith(b"{"):
        return rng.randbytes(len(data))
    return json.dumps(next(tree_mutants(json.loads(data), 1, rng.randrange(2**32)))).encode()


@amount(400)
def test_forged_shards(workplace: Workplace, count: int) -> None:
    decoded = 0
    for data in forged(workplace.encoded(0), count, seed=0):
        shard = read(workplace.request, data)
        if shard is not None:
            decoded += 1
            assert_fits(shard, workplace.request)
    assert decoded < count / 2


def test_a_class_that_the_teacher_does_not_know_is_corrupt(workplace: Workplace) -> None:
    data = workplace.encoded(0)
    assert read(workplace.request, data) is not None
    with pytest.raises(Corrupt, match="label 7 is no class of the teacher's"):
        decode(replace(workplace.request, classes=[3, 5]), 0, data)
