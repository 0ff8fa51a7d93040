"""The inside of a replay shard: its names, its one npy header, and reading it without trusting a byte.

Nothing is unpickled, evaluated or extracted to a path; sizes are compared before anything is allocated.
"""

from __future__ import annotations

import io
import json
import math
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import TAR_ERRORS
from trainer.errors import one_line
from trainer.replay.request import REQUEST_SCHEMA, ReplayRequest

Float16 = NDArray[np.float16]
Int64 = NDArray[np.int64]


class Corrupt(Exception):
    """A shard that is not what its manifest line says; the message says why."""


@dataclass(frozen=True)
class DecodedShard:
    """The K trajectories of one shard; shapes as in `TrajectoryBatch`. Read-only; the arrays in fp16 are views of the
    shard's bytes where its members lie at equal distances."""

    label: Int64
    t: Int64
    seeds: Int64
    end: Float16 | None
    states: Float16 | None
    targets: Float16 | None
    logits: Float16 | None = None


def shard_name(shard: int) -> str:
    return f"replay-{shard:06d}.tar"


def trajectory_key(trajectory: int) -> str:
    return f"{trajectory:012d}"


@lru_cache(maxsize=16)
def npy_header(shape: tuple[int, ...]) -> bytes:
    """The only npy header that is written or accepted for a shape: compared, never evaluated."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f2", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def decode(request: ReplayRequest, shard: int, data: bytes) -> DecodedShard:
    """The contents of a shard's tar. Raises Corrupt where a member is missing, surplus or not as it must be."""
    image = request.image_shape
    shapes: dict[str, tuple[int, ...]] = {"end.npy": image} if request.renoised_points else {}
    if request.path_points:
        shapes["states.npy"] = (request.path_points, *image)
    if request.teacher_targets:
        shapes["targets.npy"] = (request.points_per_trajectory, *image)
    if request.outputs:
        shapes["logits.npy"] = (request.outputs,)
    first = shard * request.shard_trajectories
    records: list[dict[str, Any]] = []
    starts: dict[str, list[int]] = {name: [] for name in shapes}  # of the numbers in the tar
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for trajectory in range(first, first + request.shard_trajectories):
                key = trajectory_key(trajectory)
                begin, end = _member(tar, f"{key}.json")
                records.append(_record(data[begin:end], trajectory, request))
                for name, shape in shapes.items():
                    starts[name].append(_array_start(data, *_member(tar, f"{key}.{name}"), shape))
            if tar.next() is not None:
                raise Corrupt("more members than a shard has")
    except TAR_ERRORS as error:
        raise Corrupt(f"not a tar ({one_line(error)})") from None
    stacked = {name: _stack(data, starts[name], shape) for name, shape in shapes.items()}
    return DecodedShard(
        label=np.array([record["label"] for record in records], dtype=np.int64),
        t=np.array([record["timesteps"] for record in records], dtype=np.int64),
        seeds=np.array([record["seeds"] for record in records], dtype=np.int64),
        end=stacked.get("end.npy"),
        states=stacked.get("states.npy"),
        targets=stacked.get("targets.npy"),
        logits=stacked.get("logits.npy"),
    )


def _member(tar: tarfile.TarFile, name: str) -> tuple[int, int]:
    """First byte and end of the next member, which must be this regular file. Nothing is ever extracted to a path."""
    member = tar.next()
    if member is None or member.name != name or not member.isreg():
        raise Corrupt(f"member {name} expected, {one_line(repr(member.name)) if member else 'the end'} found")
    return member.offset_data, member.offset_data + member.size


def _record(data: bytes, trajectory: int, request: ReplayRequest) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"trajectory {trajectory}: {error}") from None
    if not isinstance(record, dict) or record.get("schema") != REQUEST_SCHEMA:
        raise Corrupt(f"trajectory {trajectory}: not of schema {REQUEST_SCHEMA}")
    lists = [record.get("timesteps"), record.get("seeds")]
    numbers = [record.get("label"), *(value for part in lists if isinstance(part, list) for value in part)]
    if len(numbers) != 1 + 2 * request.points_per_trajectory or not all(type(value) is int for value in numbers):
        raise Corrupt(f"trajectory {trajectory}: its label, timesteps or seeds are malformed")
    if not all(-(2**63) <= value < 2**63 for value in numbers):
        raise Corrupt(f"trajectory {trajectory}: a seed is not a 64-bit number")
    if not all(0 <= t < request.timesteps for t in record["timesteps"]):
        raise Corrupt(f"trajectory {trajectory}: a timestep lies outside the schedule")
    if record["label"] not in (request.known_classes or [-1]):
        raise Corrupt(f"trajectory {trajectory}: label {record['label']} is no class of the teacher's")
    if record.get("trajectory") != trajectory or len(record["seeds"]) != request.points_per_trajectory:
        raise Corrupt(f"trajectory {trajectory}: holds another's record")
    return record


def _array_start(data: bytes, begin: int, end: int, shape: tuple[int, ...]) -> int:
    """Where the numbers of the fp16 array in data[begin:end] begin."""
    header = npy_header(shape)
    start = begin + len(header)
    if not data.startswith(header, begin) or end - start != 2 * math.prod(shape) or end > len(data):
        raise Corrupt(f"not an fp16 array of shape {shape}")
    return start


def _stack(data: bytes, starts: list[int], shape: tuple[int, ...]) -> Float16:
    """The arrays (K, *shape) that begin there: not copied where they lie at equal distances, as they do unless a
    record before one of them needs another number of blocks."""
    parts = [np.frombuffer(data, dtype="<f2", count=math.prod(shape), offset=start).reshape(shape) for start in starts]
    distances = set(np.diff(starts).tolist())
    if len(distances) != 1:
        return np.stack(parts)
    strides = (*distances, *parts[0].strides)
    return np.ndarray((len(starts), *shape), dtype="<f2", buffer=data, offset=starts[0], strides=strides)
