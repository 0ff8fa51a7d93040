"""Reading ahead: a thread that waits for shards, checks and decodes them, and gathers each step's points."""

from __future__ import annotations

import socket
import threading
import time
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.replay.decode import DecodedShard
from trainer.replay.draws import locate
from trainer.replay.points import StoredPoints, gather
from trainer.replay.pool import PoolReader
from trainer.replay.state import process_alive, read_json
from trainer.run import RunDir

Int64 = NDArray[np.int64]
POLL_SECONDS = 0.1
DECODED_SHARDS = 3  # kept in memory


class Closed(Exception):
    """The reader was closed while somebody waited for it."""


@dataclass(frozen=True)
class Loaded:
    """Points, and whether a shard of theirs had to be waited for."""

    points: StoredPoints
    missed: bool


class ReadAhead:
    """Loads points by position in one background thread; errors reach whoever asks for the result.

    Waiting for a shard that is not published ends in a UserError, but only while the trainer itself is held up
    (`starving`): after `timeout` seconds without a new shard, or when a supervisor has given its sampler up.
    """

    def __init__(self, run: RunDir, pool: PoolReader, *, timeout: float, pin: bool) -> None:
        self.run, self.pool, self.timeout, self.pin = run, pool, timeout, pin
        self.lock = threading.Lock()  # of `pool`, which the trainer's thread uses too
        self.starving: float | None = None  # since when (monotonic)
        self.misses = 0  # looks for a shard that was not there
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replay-reader")

    def submit(self, positions: Int64) -> Future[Loaded]:
        """Points of these positions (n,), in their order, as soon as their shards are there."""
        return self._thread.submit(self._load, positions)

    def wait_for(self, shard: int) -> DecodedShard:
        """A shard, as soon as it is published and intact.

        Raises:
            UserError: nobody will publish it, or another teacher did.
            Closed: the reader was closed.
        """
        news = time.monotonic()
        while not self._closing.is_set():
            with self.lock:
                if self.pool.refresh():
                    news = time.monotonic()
                if self.pool.published(shard) and (decoded := self.pool.load(shard)) is not None:
                    return decoded
            self.misses += 1
            self._fail_if_hopeless(shard, news)
            self._closing.wait(POLL_SECONDS)
        raise Closed

    def close(self) -> None:
        """End the thread, whatever it waits for. Repeatable."""
        self._closing.set()
        self._thread.shutdown(cancel_futures=True)

    def _load(self, positions: Int64) -> Loaded:
        request, misses = self.pool.request, self.misses
        shards, trajectories, points = locate(request, positions)
        parts: list[tuple[Int64, DecodedShard, Int64, Int64]] = []
        for shard in np.unique(shards).tolist():
            places = np.flatnonzero(shards == shard)
            inside = trajectories[places] - shard * request.shard_trajectories
            parts.append((places, self._shard(shard), inside, points[places]))
        loaded = gather(request, parts, len(positions))
        return Loaded(loaded.pin() if self.pin else loaded, self.misses > misses)

    def _shard(self, shard: int) -> DecodedShard:
        decoded = self._decoded.pop(shard, None) or self.wait_for(shard)
        self._decoded[shard] = decoded
        while len(self._decoded) > DECODED_SHARDS:
            self._decoded.popitem(last=False)
        return decoded

    def _fail_if_hopeless(self, shard: int, news: float) -> None:
        starving, now = self.starving, time.monotonic()
        if starving is None:
            return
        path = self.pool.directory
        if message := given_up(self.run):
            raise UserError(f"{path}: shard {shard} will not come: {message}")
        if now - max(starving, news) > self.timeout:
            raise UserError(
                f"{path}: no new shard in replay.timeout={self.timeout:g} seconds, shard {shard} is needed: is a "
                f"sampler running? ({describe_samplers(self.run)})"
            )


def given_up(run: RunDir) -> str:
    """What a living supervisor said when it gave its sampler up; empty while none did."""
    for path in sorted(run.supervisor(0).parent.glob("supervisor-*.json")):
        status = read_json(path)
        if status.get("given_up") and _lives(status):
            return str(status["given_up"])
    return ""


def restarts(run: RunDir) -> int:
    """Restarts of samplers in this attempt, over all supervisors."""
    statuses = [read_json(path) for path in sorted(run.supervisor(0).parent.glob("supervisor-*.json"))]
    return sum(int(status.get("restarts", 0)) for status in statuses if _lives(status))


def describe_samplers(run: RunDir) -> str:
    """The samplers' heartbeats in a few words."""
    words: list[str] = []
    for path in sorted(run.sampler(0).parent.glob("sampler-*.json")):
        beat = read_json(path)
        if beat:
            age = max(0.0, time.time() - float(beat.get("time", 0.0)))
            words.append(f"{path.stem}: {beat.get('status', '?')}, last heard of {age:.0f} s ago")
    return "; ".join(words) or "none was ever heard of"


def _lives(status: dict[str, Any]) -> bool:
    """Whether the writer of a status file runs; on another host that cannot be seen."""
    return status.get("host") != socket.gethostname() or process_alive(int(status.get("pid", 0)))
