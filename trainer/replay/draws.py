"""Which stored replay point each position of the training sequence uses: known before anything is sampled."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.replay.request import ReplayRequest
from trainer.seeds import derive

Int64 = NDArray[np.int64]


def draws(request: ReplayRequest, start: int, stop: int) -> tuple[Int64, Int64, Int64]:
    """Shard, trajectory (counted over all shards) and point of the positions [start, stop), each (stop - start,).

    Step s of global replay batch R uses positions [sR, (s + 1)R); rank r of n takes the r-th n-th of them. With S
    points per shard, position p uses shard p // (S * reuse), for the (p // S) % reuse-th time, at the place that a
    permutation of S of its own gives to p % S.
    """
    return locate(request, np.arange(start, stop, dtype=np.int64))


def locate(request: ReplayRequest, positions: Int64) -> tuple[Int64, Int64, Int64]:
    """The same for any positions (n,)."""
    count = request.shard_points
    inner = np.empty_like(positions)
    blocks = positions // count
    for block in np.unique(blocks):
        here = blocks == block
        inner[here] = _permutation(request.seed, request.task, count, int(block))[positions[here] % count]
    shard = blocks // request.reuse
    trajectory = shard * request.shard_trajectories + inner // request.points_per_trajectory
    return shard, trajectory, inner % request.points_per_trajectory


@lru_cache(maxsize=8)
def _permutation(seed: int, task: int, count: int, block: int) -> Int64:
    """A permutation of `count` for one use of one shard; hashes sorted, so that no library's version changes it."""
    ranks = derive(seed, f"replay-draw/{task}", np.asarray([block], dtype=np.uint64), np.arange(count, dtype=np.uint64))
    return np.argsort(ranks, kind="stable")
