"""The global order of samples: a pure function of (seed, task, epoch), the same on every rank and worker."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trainer.seeds import hash_key


def order(seed: int, task: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The permutation of `count` samples in one epoch, shape (count,), read-only."""
    return _order(seed, task, epoch, count)


def positions(seed: int, task: int, count: int, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Samples at positions [start, stop) of the endless order, which crosses epochs without a gap.

    Returns:
        indices (stop - start,) into the data set, and the epoch (stop - start,) each belongs to.
    """
    assert count > 0 and 0 <= start <= stop, (count, start, stop)
    where = np.arange(start, stop, dtype=np.int64)
    epochs, offsets = np.divmod(where, count)
    indices = np.empty_like(where)
    for epoch in range(start // count, (stop - 1) // count + 1 if stop > start else 0):
        inside = epochs == epoch
        indices[inside] = order(seed, task, epoch, count)[offsets[inside]]
    return indices, epochs


@lru_cache(maxsize=8)
def _order(seed: int, task: int, epoch: int, count: int) -> NDArray[np.int64]:
    # Sorting raw Philox words, not Generator.permutation: numpy keeps raw streams stable between versions, and only
    # those. A tie of two 64-bit words is settled by the stable sort.
    words = np.random.Philox(key=hash_key(f"order/{seed}/{task}/{epoch}")).random_raw(count)
    permutation = np.argsort(words, kind="stable").astype(np.int64, copy=False)
    permutation.setflags(write=False)
    return permutation
