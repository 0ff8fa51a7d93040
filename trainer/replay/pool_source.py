"""Replay from a pool that samplers fill while the trainer learns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import torch

from trainer.config import OnStarved
from trainer.data.batch import Examples
from trainer.data.shards import FULL_DISK
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.replay.points import StoredPoints, to_examples
from trainer.replay.pool import PoolReader
from trainer.replay.reader import Loaded, ReadAhead, given_up, restarts
from trainer.replay.request import KEPT_SHARDS, ReplayRequest
from trainer.replay.state import write_json
from trainer.run import RunDir

Journal = Callable[[dict[str, Any]], None]
RETRY_SECONDS = 1.0  # between two tries to publish the progress on a full disk, while waiting for a shard
COUNTERS = ("points_used", "starved_seconds", "starved_steps", "reused_steps", "real_only_steps")


class Ranks(Protocol):
    """What is needed of the training world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast_int(self, value: int) -> int: ...


class PoolSource:
    """This rank's share of each step's replay points, from the shards of `run.replay(request.task)`.

    Under `wait` a position names its shard, so all ranks use the same points without talking. Under the other
    policies rank 0 says which shards are there, whenever those it named before do not cover a step.
    """

    def __init__(
        self,
        run: RunDir,
        request: ReplayRequest,
        *,
        batch: int,
        world: Ranks,
        schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
        on_starved: OnStarved,
        timeout: float,
        start_step: int = 0,
        prefetch: int = 4,
        restored: Mapping[str, float] | None = None,
        journal: Journal | None = None,
    ) -> None:
        """`batch` is over all ranks; `restored` are the counters of `stats` at `start_step`; `journal` gets events.

        Raises:
            UserError: the pool holds another teacher's shards.
        """
        assert batch % world.size == 0, "checked before the run starts"
        self.run, self.request, self.batch, self.world = run, request, batch, world
        self.schedule, self.device, self.dtype = schedule.to(device), device, dtype
        self.on_starved, self.timeout, self.prefetch, self.journal = on_starved, timeout, prefetch, journal
        self.stop_step = request.positions // batch
        self.counters = {name: (restored or {}).get(name, 0) for name in COUNTERS}
        self.step = start_step
        self.released = 0
        self._unpublished = False  # the progress: the disk was full
        self._agreed = (0, 0)  # shards [a, b) that rank 0 has found intact
        self._kept = (0, 0)  # shards that `reuse` draws on
        self._started = False
        self._pending: dict[int, Future[Loaded]] = {}
        pool = PoolReader(run.replay(request.task), request)
        pool.refresh()
        self.reader = ReadAhead(run, pool, timeout=timeout, pin=device.type == "cuda")
        self._publish_progress(self._releasable(start_step))

    def points(self, step: int) -> Examples | None:
        """Training pairs of this rank for a step of the task, counted from 0; None where `real_only` goes without.

        Raises:
            UserError: starved, and the policy or the end of all hope says that the run ends.
        """
        self.step = step
        if self._unpublished:
            self._publish_progress(self.released)
        if self.on_starved is not OnStarved.wait and not self._covered(step):
            self._agree(step)
            if not self._covered(step):
                return self._starved(step)
        self._read_ahead(step)
        return self._examples(self._result(self._pending.pop(step)))

    def release(self, step: int) -> None:
        """A checkpoint after `step` steps is published: earlier points are not needed again. Every rank calls it."""
        self._publish_progress(self._releasable(step))

    def stats(self) -> dict[str, Any]:
        """Counts since the beginning of the task: points and seconds over the attempts whose counters were restored,
        evaluations of all attempts (from the manifest), events, and the fill of the pool."""
        with self.reader.lock:
            pool = self.reader.pool
            pool.refresh()
            manifest = pool.manifest
            here = self.request.shard_of(self.step * self.batch)
            return {
                **self.counters,
                "teacher_evaluations": manifest.evaluations,
                "pool_ready": sum(shard >= here and pool.published(shard) for shard in manifest.shards),
                "pool_needed": max(0, self.request.shards - here),
                "pool_bytes": sum(line.bytes for line in manifest.shards.values()),
                "events": {
                    "corrupt": manifest.redone,
                    "retired": manifest.retired,
                    "restarts": restarts(self.run),
                    "given_up": int(bool(given_up(self.run))),
                },
            }

    def close(self) -> None:
        """End the reading thread. Repeatable."""
        self.reader.close()

    # --- reading -------------------------------------------------------------------------------------------------

    def _read_ahead(self, step: int) -> None:
        for ahead in range(step, min(step + 1 + self.prefetch, self.stop_step)):
            if ahead not in self._pending and (self.on_starved is OnStarved.wait or self._covered(ahead)):
                self._pending[ahead] = self.reader.submit(self._positions(ahead))

    def _positions(self, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        share = self.batch // self.world.size
        first = step * self.batch + self.world.rank * share
        return np.arange(first, first + share, dtype=np.int64)

    def _result(self, future: Future[Loaded]) -> StoredPoints:
        """Wait for a result; the time counts as starved if a shard was not there (decoding one is no starvation)."""
        if future.done():
            return future.result().points
        with self._held_up() as began:
            while self._unpublished and not wait([future], RETRY_SECONDS).done:  # the samplers may wait for its room
                self._publish_progress(self.released)
            loaded = future.result()
        if loaded.missed:
            self._count_starved(began)
        return loaded.points

    @contextmanager
    def _held_up(self) -> Iterator[float]:
        """Since when (monotonic) the trainer stands still; the reader gives up hope only while it does."""
        self.reader.starving = time.monotonic()
        try:
            yield self.reader.starving
        finally:
            self.reader.starving = None

    def _count_starved(self, began: float) -> None:
        self.counters["starved_seconds"] += time.monotonic() - began
        self.counters["starved_steps"] += 1

    def _examples(self, points: StoredPoints) -> Examples:
        self.counters["points_used"] += self.batch
        return to_examples(self.request, points, self.schedule, self.device, self.dtype)

    # --- policies other than wait --------------------------------------------------------------------------------

    def _shards_of(self, step: int) -> tuple[int, int]:
        """First and last shard that all ranks together need for a step."""
        first = step * self.batch
        return self.request.shard_of(first), self.request.shard_of(first + self.batch - 1)

    def _covered(self, step: int) -> bool:
        first, last = self._shards_of(step)
        return self._agreed[0] <= first and last < self._agreed[1]

    def _agree(self, step: int) -> None:
        """Rank 0 looks which shards from this step's first on are there and intact, and tells the others."""
        first, last = self._shards_of(step)
        if self.on_starved is OnStarved.fail and not self._started and self.world.rank == 0:
            self._await_first(first, last)
        self._started = True
        stop = self.world.broadcast_int(self._intact_until(first) if self.world.rank == 0 else 0)
        self._agreed = (first, stop)
        if stop > first:
            low, high = self._kept
            start = low if low < high and high >= first else first  # one run of shards, the latest of it
            self._kept = (max(start, stop - KEPT_SHARDS), stop)

    def _intact_until(self, first: int) -> int:
        with self.reader.lock:
            pool = self.reader.pool
            pool.refresh()
            known = self._agreed[1] if self._agreed[0] <= first else first
            shard = max(first, min(known, self.request.shards))
            while shard < self.request.shards and pool.published(shard) and pool.intact(shard):
                shard += 1
            return shard

    def _await_first(self, first: int, last: int) -> None:
        """The first shards of a pool take their time even with a healthy sampler."""
        misses = self.reader.misses
        with self._held_up() as began:
            for shard in range(first, last + 1):
                self.reader.wait_for(shard)
        if self.reader.misses > misses:
            self._count_starved(began)

    def _starved(self, step: int) -> Examples | None:
        self.counters["starved_steps"] += 1
        if self.on_starved is OnStarved.fail:
            raise UserError(
                f"{self.run.replay(self.request.task)}: starved at step {step}, shards {self._shards_of(step)[0]} to "
                f"{self._shards_of(step)[1]} are not there (replay.on_starved=fail)"
            )
        low, high = self._kept
        if self.on_starved is OnStarved.real_only or low == high:
            self.counters["real_only_steps"] += 1
            self._write_journal({"event": "replay_real_only", "task": self.request.task, "step": step})
            return None
        self.counters["reused_steps"] += 1
        self._write_journal({"event": "replay_reused", "task": self.request.task, "step": step, "shards": [low, high]})
        stock = (high - low) * self.request.shard_uses
        positions = low * self.request.shard_uses + self._positions(step) % stock
        return self._examples(self._result(self.reader.submit(positions)))

    def _write_journal(self, event: dict[str, Any]) -> None:
        if self.journal is not None and self.world.rank == 0:
            self.journal(event)

    # --- giving back ---------------------------------------------------------------------------------------------

    def _releasable(self, step: int) -> int:
        """Shards below this are no longer needed from a checkpoint at `step` on; one is kept for a rank behind."""
        return max(0, self.request.shard_of(step * self.batch) - 1)

    def _publish_progress(self, released: int) -> None:
        """Tell the samplers; on a full disk at the next opportunity."""
        self.released = released
        if self.world.rank == 0:
            kept = list(self._kept) if self.on_starved is OnStarved.reuse else [0, 0]
            try:
                write_json(self.run.replay_progress(self.request.task), {"released": released, "kept": kept})
                self._unpublished = False
            except OSError as error:  # the samplers go by what they were told before
                if error.errno not in FULL_DISK:
                    raise
                self._unpublished = True
