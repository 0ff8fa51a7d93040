"""The replay pool: shards of trajectories, published whole and checked before use.

One tar per shard, readable as any WebDataset: for each trajectory `<key>.json` (label, start seed, and of each point
its timestep and noise seed) with `<key>.end.npy` or `<key>.states.npy`, and `<key>.targets.npy`, in fp16.
"""

from __future__ import annotations

import json
import sys
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Retirement
from trainer.data.shards import Sample, ShardEntry, encode_shard, write_atomic
from trainer.errors import UserError
from trainer.replay.decode import Corrupt, DecodedShard, Float16, decode, npy_header, shard_name, trajectory_key
from trainer.replay.manifest import Manifest, ShardLine, new_id
from trainer.replay.request import REQUEST_SCHEMA, ReplayRequest
from trainer.replay.state import write_json
from trainer.replay.trajectory import TrajectoryBatch
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
        parts = {"end.npy" if request.renoised else "states.npy": batch.images}
        if batch.targets is not None:
            parts["targets.npy"] = batch.targets
        arrays = {name: tensor.cpu().numpy() for name, tensor in parts.items()}
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise UserError(f"{request.teacher}: the teacher's samples of shard {shard} hold NaN or infinite numbers")
        for record, row in zip(_records(batch), range(len(batch.indices)), strict=True):
            members = {"json": json.dumps(record, separators=(",", ":")).encode()}
            members.update({name: _npy(array[row]) for name, array in arrays.items()})
            samples.append(Sample(trajectory_key(record["trajectory"]), members))
    return encode_shard(shard_name(shard), samples)


def publish(
    manifest: Manifest,
    request: ReplayRequest,
    shard: int,
    encoded: tuple[ShardEntry, bytes],
    *,
    micro_batch: int,
    evaluations: int,
    seconds: float,
    worker: int,
) -> ShardLine:
    """Put a shard into the pool: the file first, whole or not at all, then its line.

    Raises:
        OSError: the disk refuses; nothing half-written counts.
    """
    entry, data = encoded
    write_atomic(manifest.path.parent / entry.name, data)
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
    manifest = Manifest(run.replay(task))
    manifest.refresh()
    for shard, line in sorted(manifest.shards.items()):
        (run.replay(task) / shard_name(shard)).unlink(missing_ok=True)
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


# --- reading ----------------------------------------------------------------------------------------------------


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class PoolReader:
    """Reads published shards of one request; refuses what another teacher made, asks again for what is corrupt."""

    def __init__(self, directory: Path, request: ReplayRequest, notice: Callable[[str], None] = _print) -> None:
        self.directory, self.request, self.notice = directory, request, notice
        self.manifest = Manifest(directory)
        self._checked: dict[int, str] = {}  # shard -> id of the publication found to be of this request
        self._bad: dict[int, tuple[str, str]] = {}  # shard -> id of the publication that is corrupt, and why

    def refresh(self) -> bool:
        """Look for new shards; whether there are any. Raises UserError as `check` does."""
        news = self.manifest.refresh()
        if news:
            for shard, line in self.manifest.shards.items():
                if self._checked.get(shard) != line.id:
                    self.check(line)
                    self._checked[shard] = line.id
        self._report_bad()
        return news

    def check(self, line: ShardLine) -> None:
        """Raises UserError, naming the file, where a shard is not of this request."""
        path = self.directory / shard_name(line.shard)
        if line.teacher_id != self.request.teacher_id:
            raise UserError(
                f"{path}: made by teacher {line.teacher_id[:12]}, this run's teacher is {self.request.teacher_id[:12]}"
            )
        for key, wanted in self.request.sampler().items():
            if line.sampler.get(key) != wanted:
                raise UserError(f"{path}: sampled with {key}={line.sampler.get(key)}, this run asks for {wanted}")

    def published(self, shard: int) -> bool:
        """Whether the manifest has it, as far as read, and nobody found it corrupt."""
        return shard in self.manifest.shards and not self._is_bad(shard)

    def intact(self, shard: int) -> bool:
        """Whether a published shard is what its line says; one that is not is asked for again."""
        return self._bytes(shard) is not None

    def load(self, shard: int) -> DecodedShard | None:
        """A published shard, or None where it is corrupt: then it is asked for again."""
        data = self._bytes(shard)
        if data is None:
            return None
        try:
            return decode(self.request, shard, data)
        except Corrupt as error:
            self._ask_again(shard, str(error))
            return None

    def _bytes(self, shard: int) -> bytes | None:
        line = self.manifest.shards[shard]
        path = self.directory / shard_name(shard)
        try:
            if line.bytes > self.request.shard_bytes or line.count != self.request.shard_trajectories:
                raise Corrupt(f"{line.count} trajectories in {line.bytes} bytes are not one shard")
            if (size := path.stat().st_size) != line.bytes:
                raise Corrupt(f"{size} bytes, {line.bytes} expected")
            data = path.read_bytes()
            if zlib.crc32(data) != line.crc32:
                raise Corrupt("its checksum is not the one of the manifest")
        except (OSError, Corrupt) as error:
            self._ask_again(shard, str(error))
            return None
        return data

    def _ask_again(self, shard: int, reason: str) -> None:
        self._bad[shard] = (self.manifest.shards[shard].id, reason)
        self.notice(f"{self.directory / shard_name(shard)}: corrupt ({reason}); asked for again")
        self._report_bad()

    def _is_bad(self, shard: int) -> bool:
        line = self.manifest.shards.get(shard)
        return line is not None and shard in self._bad and self._bad[shard][0] == line.id

    def _report_bad(self) -> None:
        """Tell the samplers; where the disk is full, at a later call."""
        for shard, (id, reason) in self._bad.items():
            if self._is_bad(shard):
                try:
                    self.manifest.redo(shard, id, reason)
                except OSError:
                    return
        if self._bad:
            self.manifest.refresh()
