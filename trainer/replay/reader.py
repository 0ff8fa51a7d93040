"""Reading ahead on one rank: a thread checks and decodes the shards that are offered and gathers each step's points."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trainer.replay.decode import Corrupt, DecodedShard, decode
from trainer.replay.draws import locate
from trainer.replay.points import StoredPoints, gather
from trainer.replay.request import ReplayRequest
from trainer.replay.transport import Transport

Int64 = NDArray[np.int64]
T = TypeVar("T")
DECODED_SHARDS = 3  # kept in memory
LOOKS = 3  # at a file that is not what it should be: a network file system may show an old state
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Offer:
    """A published shard as the main rank names it to all ranks: what its file must be. `serial` counts the offers."""

    shard: int
    bytes: int
    crc32: int
    serial: int


class BadShard(Exception):
    """An offered shard whose file is something else."""

    def __init__(self, offer: Offer, reason: str) -> None:
        self.offer, self.reason = offer, reason
        super().__init__(reason)


class Loader:
    """Loads the points of coming steps, in order, from the shards that were offered so far."""

    def __init__(
        self, pool: Transport, request: ReplayRequest, positions: Callable[[int], Int64], *, depth: int, pin: bool
    ) -> None:
        """`positions(step)` are this rank's (n,); `depth` steps at most are held; `pin` for copies to a GPU."""
        self.pool, self.request, self.positions = pool, request, positions
        self.depth, self.pin = depth, pin
        self.offers: dict[int, Offer] = {}
        self.found_bad: list[BadShard] = []  # since somebody emptied it
        self._complained: set[int] = set()  # serials of offers
        self._bad: dict[int, str] = {}  # serials of offers, and what is wrong: not read again for each step
        self._steps: dict[int, Future[StoredPoints]] = {}
        self._decoded: OrderedDict[int, DecodedShard] = OrderedDict()
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replay-reader")

    def offer(self, offers: Iterable[Offer]) -> None:
        """Shards that may be read from now on; one offered again takes the place of its earlier self."""
        self.offers |= {offer.shard: offer for offer in offers}

    def forget(self, shard: int) -> None:
        """An offered shard is to be made again."""
        self.offers.pop(shard, None)

    def forget_below(self, shard: int) -> None:
        """Shards below this will not be asked for any more."""
        for old in [known for known in self.offers if known < shard]:
            del self.offers[old]

    def advance(self, step: int, stop: int) -> None:
        """Start loading what can be of the steps from `step` on, before `stop`."""
        for ahead in range(step, min(step + self.depth, stop)):
            if ahead in self._steps:
                continue
            positions = self.positions(ahead)
            if not self._offered(positions):
                return
            self._steps[ahead] = self.load(positions)

    def ready_until(self, step: int) -> int:
        """The first step from `step` on whose points are not in memory; notes shards found bad on the way."""
        self._drop_failed()
        while (future := self._steps.get(step)) is not None and future.done() and future.exception() is None:
            step += 1
        return step

    def take(self, step: int) -> StoredPoints:
        """The points of a step that is ready; earlier ones are dropped."""
        for old in [known for known in self._steps if known < step]:
            del self._steps[old]
        return self._steps.pop(step).result()

    def load(self, positions: Int64) -> Future[StoredPoints]:
        """Points of any positions (n,) whose shards were offered. The future may raise BadShard."""
        offers = {shard: self.offers[shard] for shard in np.unique(positions // self.request.shard_uses).tolist()}
        return self.run(lambda: self._gather(positions, offers))

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Do something else in this thread, after what was asked before."""
        return self._thread.submit(work)

    def wait(self, step: int, seconds: float) -> None:
        """Until a step's loading ends, or the time is over."""
        future: Future[Any] | None = self._steps.get(step)
        if future is None:
            self._closing.wait(seconds)
            return
        done = threading.Event()
        future.add_done_callback(lambda _: done.set())
        done.wait(seconds)

    def close(self) -> None:
        """End the thread. Repeatable."""
        self._closing.set()
        self.pool.interrupt()
        self._thread.shutdown(cancel_futures=True)

    # --- in the thread -------------------------------------------------------------------------------------------

    def _gather(self, positions: Int64, offers: dict[int, Offer]) -> StoredPoints:
        request = self.request
        shards, trajectories, points = locate(request, positions)
        parts: list[tuple[Int64, DecodedShard, Int64, Int64]] = []
        for shard, offer in offers.items():
            places = np.flatnonzero(shards == shard)
            inside = trajectories[places] - shard * request.shard_trajectories
            parts.append((places, self._shard(offer), inside, points[places]))
        return gather(request, parts, len(positions), pin=self.pin)

    def _shard(self, offer: Offer) -> DecodedShard:
        decoded = self._decoded.pop(offer.shard, None)
        if decoded is None:
            try:
                if offer.serial in self._bad:
                    raise Corrupt(self._bad[offer.serial])
                decoded = decode(self.request, offer.shard, self._read(offer))
            except Corrupt as error:
                self._bad[offer.serial] = str(error)
                raise BadShard(offer, str(error)) from None
        self._decoded[offer.shard] = decoded
        while len(self._decoded) > DECODED_SHARDS:
            self._decoded.popitem(last=False)
        return decoded

    def _read(self, offer: Offer) -> bytes:
        """The bytes that were offered. Raises Corrupt where the file has others, or there is none."""
        reason = ""
        for look in range(LOOKS):
            if look:
                self._closing.wait(LOOK_SECONDS * look)
            try:
                return self.pool.get(offer.shard, offer.bytes, offer.crc32)
            except (OSError, Corrupt) as error:
                reason = str(error)
        raise Corrupt(reason)

    # --- parts ---------------------------------------------------------------------------------------------------

    def _offered(self, positions: Int64) -> bool:
        first, last = int(positions[0]), int(positions[-1])
        return all(
            shard in self.offers for shard in range(self.request.shard_of(first), self.request.shard_of(last) + 1)
        )

    def _drop_failed(self) -> None:
        for step in [step for step, future in self._steps.items() if future.done() and future.exception() is not None]:
            error = self._steps.pop(step).exception()
            if not isinstance(error, BadShard):
                assert error is not None
                raise error
            self.complain(error)

    def complain(self, error: BadShard) -> None:
        """Note a bad shard for the others, once; until they have heard of it, it stays among the offers."""
        if error.offer.serial not in self._complained:
            self._complained.add(error.offer.serial)
            self.found_bad.append(error)
