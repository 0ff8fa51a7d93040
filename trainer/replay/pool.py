"""The replay pool: shards of trajectories, published whole and checked before use.

One tar per shard, a file or an object of a store (`trainer.replay.transport`), readable as any WebDataset: for each
trajectory `<key>.json` (label, start seed, and of each point its timestep and noise seed) with `<key>.end.npy`,
`<key>.states.npy` or both, `<key>.targets.npy` and, of a labelled pool, `<key>.logits.npy`, in fp16.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config import Retirement
from trainer.data.shards import Sample, ShardEntry, encode_shard
from trainer.errors import UserError
from trainer.replay.decode import Float16, npy_header, shard_name, trajectory_key
from trainer.replay.manifest import Manifest, ShardLine, new_id
from trainer.replay.request import REQUEST_SCHEMA, ReplayRequest
from trainer.replay.state import write_json
from trainer.replay.trajectory import TrajectoryBatch
from trainer.replay.transport import Transport, pool_of_task
from trainer.run import RunDir

NEVER = 1 << 62  # no pool has a shard of this number

# --- writing ----------------------------------------------------------------------------------------------------


def encode(request: ReplayRequest, shard: int, batches: Sequence[TrajectoryBatch]) -> tuple[ShardEntry, bytes]:
    """The tar of one shard and its description.

    Raises:
        UserError: the teacher gave numbers that are not finite.
    """
    samples: list[Sample] = []
    for batch in batches:
        parts = {"end.npy": batch.end, "states.npy": batch.states, "targets.npy": batch.targets}
        parts["logits.npy"] = batch.logits
        arrays = {name: tensor.cpu().numpy() for name, tensor in parts.items() if tensor is not None}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(f"{request.teacher}: the teacher's samples of shard {shard} hold NaN or infinite numbers")
        for record, row in zip(_records(batch), range(len(batch.indices)), strict=True):
            members = {"json": json.dumps(record, separators=(",", ":")).encode()}
            members.update({name: _npy(array[row]) for name, array in arrays.items()})
            samples.append(Sample(trajectory_key(record["trajectory"]), members))
    return encode_shard(shard_name(shard), samples)


def publish(
    pool: Transport,
    manifest: Manifest,
    request: ReplayRequest,
    shard: int,
    encoded: tuple[ShardEntry, bytes],
    *,
    micro_batch: int,
    evaluations: int,
    seconds: float,
    worker: int,
    rejected: int = 0,
    lacking: Mapping[int, int] | None = None,
) -> ShardLine:
    """Put a shard into the pool: the file first, whole or not at all, then its line.

    Raises:
        OSError: the disk refuses; nothing half-written counts.
        UserError: a store does.
    """
    entry, data = encoded
    pool.put(shard, data)
    line = ShardLine(
        id=new_id(),
        shard=shard,
        name=entry.name,
        count=entry.count,
        points=entry.count * request.points_per_trajectory,
        bytes=entry.bytes,
        crc32=entry.crc32,
        sha256=entry.sha256,
        teacher_id=request.teacher_id,
        sampler=request.sampler(),
        micro_batch=micro_batch,
        evaluations=evaluations,
        seconds=round(seconds, 3),
        worker=worker,
        rejected=rejected,
        lacking={str(label): count for label, count in (lacking or {}).items()},
    )
    manifest.publish(line)
    return line


def discard(run: RunDir, task: int, retirement: Retirement = Retirement.delete) -> None:
    """Give up the pool of a task that is learnt: the samplers are told that nothing of it is needed any more.

    Its shards are deleted, or stay as they are (`Retirement.keep`). The manifest stays, as the record of what the
    pool cost.
    """
    write_json(run.replay_progress(task), {"released": NEVER, "kept": [0, 0], "used": NEVER})
    if retirement is Retirement.keep:
        return
    pool = pool_of_task(run, task)
    manifest = Manifest(pool.open_journal())
    manifest.refresh()
    for shard, line in sorted(manifest.shards.items()):
        pool.delete(shard)
        manifest.retire(shard, line.id)


def _records(batch: TrajectoryBatch) -> list[dict[str, Any]]:
    columns = zip(
        batch.indices.tolist(),
        batch.label.tolist(),
        batch.start_seeds.tolist(),
        batch.t.tolist(),
        batch.seeds.tolist(),
        strict=True,
    )
    return [
        {"schema": REQUEST_SCHEMA, "trajectory": index, "label": label, "seed": seed, "timesteps": t, "seeds": seeds}
        for index, label, seed, t, seeds in columns
    ]


def _npy(array: Float16) -> bytes:
    return npy_header(array.shape) + array.astype("<f2", copy=False).tobytes()
