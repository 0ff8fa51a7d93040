"""Which points stand in for those that are late (`replay.on_starved=reuse`), and how often a point may."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
from numpy.typing import NDArray

from trainer.replay.request import KEPT_SHARDS, ReplayRequest


class ReuseBudget:
    """Draws on the shards used last, each stored point at most `cap` times in all (its ordinary uses among them).

    A pure function of what all ranks know, so that they draw alike.
    """

    def __init__(self, request: ReplayRequest, cap: int, drawn: Mapping[str, int] | None = None) -> None:
        """`drawn` is an earlier `state()`."""
        self._request = request
        self._allowance = max(0, cap - request.reuse) * request.shard_points
        self._drawn = {int(shard): count for shard, count in (drawn or {}).items()}
        self.kept = range(0)

    def used(self, shard: int) -> None:
        """A step has used points of this shard."""
        self.kept = range(max(0, shard + 1 - KEPT_SHARDS), shard + 1)
        self._drawn = {old: count for old, count in self._drawn.items() if old in self.kept}

    def draw(self, count: int, there: Container[int]) -> NDArray[np.int64] | None:
        """`count` positions (count,) of shards that are kept and `there`, the latest first; None: too few are left."""
        request, drawn, parts = self._request, dict(self._drawn), list[NDArray[np.int64]]()
        for shard in reversed(self.kept):
            left = self._allowance - drawn.get(shard, 0) if shard in there else 0
            taken = min(left, count)
            if taken > 0:
                places = np.arange(drawn.get(shard, 0), drawn.get(shard, 0) + taken, dtype=np.int64)
                parts.append(shard * request.shard_uses + places % request.shard_uses)
                drawn[shard] = drawn.get(shard, 0) + taken
                count -= taken
        if count:
            return None
        self._drawn = drawn
        return np.concatenate(parts)

    def state(self) -> dict[str, int]:
        """What a checkpoint keeps."""
        return {str(shard): count for shard, count in self._drawn.items()}
