"""Backpressure: which shards may lie in a pool, which are made now, and which make room for them.

The trainer says how far it is (`progress.json`); what the samplers do is a function of that and of the manifest, so
that any number of them agree without talking.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from trainer.replay.request import ReplayRequest
from trainer.replay.state import read_json


@dataclass(frozen=True)
class Progress:
    """The trainer's place: shards below `released` may go, those in `kept` must stay, `used` is the first that its
    present step uses. None: it does not say, so a sampler must not wait for it to move."""

    released: int = 0
    kept: range = range(0)
    used: int | None = 0


def read_progress(path: Path) -> Progress | None:
    """What the trainer said last; None where that is missing or malformed."""
    content = read_json(path)
    released, kept, used = content.get("released"), content.get("kept"), content.get("used")
    if type(released) is not int or not isinstance(kept, list) or len(kept) != 2:
        return None
    if not all(type(bound) is int for bound in kept) or not (used is None or type(used) is int):
        return None
    if not 0 <= released < 1 << 63 or not 0 <= kept[0] <= kept[1] < 1 << 63 or (used is not None and used < 0):
        return None
    return Progress(released, range(*kept), used)


@dataclass(frozen=True)
class Limits:
    """How much a pool of `total` shards may hold: `capacity` shards in all (`replay.pool_gb`), and `high` that the
    trainer has not begun to use; with `low` or fewer of those it is filled again."""

    total: int
    capacity: int
    high: int
    low: int

    @staticmethod
    def of(request: ReplayRequest) -> Limits:
        high = request.pool_shards or request.capacity
        low = max(int(request.low_watermark * high), request.shards_ahead)
        return Limits(request.shards, request.capacity, high, low)

    def room(self, progress: Progress) -> range:
        """The shards that fit under the limit in bytes, those used but not yet released among them."""
        return range(progress.released, min(self.total, progress.released + self._beside_kept(progress)))

    def surplus(self, shard: int, present: Collection[int], progress: Progress) -> list[int]:
        """Of the shards `present`, what must go before `shard` is published, so that no more than `capacity` remain.

        What is left, beside those kept, lies within as many successive places as `room` has at most, also when other
        samplers publish other shards of `room` at the same time.
        """
        room = self._beside_kept(progress)
        end = progress.released + room
        newest = max([shard, *(other for other in present if other < end)])
        return sorted(
            other for other in present if other not in progress.kept and (other <= newest - room or other >= end)
        )

    def _beside_kept(self, progress: Progress) -> int:
        """Places from `released` on, so that they and the shards kept elsewhere are `capacity` together."""
        kept, released = progress.kept, progress.released
        before = max(0, min(kept.stop, released) - kept.start)
        places = self.capacity - before
        return max(1, places if kept.stop <= released + places else self.capacity - len(kept))


class Filling:
    """Whether a pool is being filled: until it is full, and again once little of it is unused.

    A sampler that rests still makes shards that are missing before the newest one (corrupt, or another sampler's turn
    that never came), so a trainer that waits is always served.
    """

    def __init__(self) -> None:
        self.active = True

    def wanted(self, published: Collection[int], progress: Progress, limits: Limits) -> list[int]:
        """The shards to be made now, by whichever sampler they belong to, in ascending order."""
        room = limits.room(progress)
        if progress.used is not None:  # what lies before it is needed by nobody but a resumed run, which will say so
            room = range(max(room.start, progress.used), min(room.stop, progress.used + 1 + limits.high))
        missing = [shard for shard in room if shard not in published]
        if progress.used is None or sum(shard > progress.used for shard in published) <= limits.low:
            self.active = True
        elif not missing:
            self.active = False
        if self.active:
            return missing
        newest = max(published)  # there is one: more than `low` are unused
        return [shard for shard in missing if shard < newest]
