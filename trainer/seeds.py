"""Seeds as a pure function of (run seed, purpose, sample key, draw): no generator state anywhere.

Everything random about one sample (its timestep, noise, flip, start noise) uses one 64-bit seed derived here, which
keys a counter-based Philox generator (`trainer.kernels.philox`). So it does not depend on world size, micro-batch,
rank or restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

UInt64 = NDArray[np.uint64]


def hash_key(key: str) -> int:
    """A stable 64-bit id of a sample key."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def hash_keys(keys: Iterable[str]) -> UInt64:
    """Stable 64-bit ids, shape (N,)."""
    return np.fromiter((hash_key(key) for key in keys), dtype=np.uint64)


def derive(run_seed: int, purpose: str, keys: UInt64, draws: UInt64 | int = 0) -> NDArray[np.int64]:
    """Seeds, shape (N,), for the `draws`-th use of each sample key for one purpose ("noise", "timestep", ...).

    SplitMix64's finaliser (Steele et al. 2014) chained over the parts; as int64, the type torch and Triton take.
    """
    base = hash_key(f"{run_seed}/{purpose}")
    with np.errstate(over="ignore"):
        mixed = _mix(np.asarray(keys, dtype=np.uint64) ^ np.uint64(base))
        mixed = _mix(mixed + np.asarray(draws, dtype=np.uint64))
    return mixed.view(np.int64)


def smallest(run_seed: int, purpose: str, keys: UInt64, count: int) -> NDArray[np.int64]:
    """Indices of `count` samples, of all where there are fewer: those with the smallest derived seeds, in their order.

    A random choice that depends on the seed, the purpose and the keys alone, not on the order of the samples.
    """
    rank = derive(run_seed, purpose, keys).view(np.uint64)
    return np.lexsort((keys, rank))[:count].astype(np.int64)


def smallest_of_each(
    run_seed: int, purpose: str, keys: UInt64, labels: NDArray[np.int64], count: int
) -> NDArray[np.int64]:
    """The same of each label: indices of at most `count` samples of each, labels in rising order."""
    rank = derive(run_seed, purpose, keys).view(np.uint64)
    ranked = np.lexsort((keys, rank, labels))
    ordered = labels[ranked]
    starts = np.searchsorted(ordered, ordered)  # first position of each sample's label
    return ranked[np.arange(len(ranked)) - starts < count].astype(np.int64)


def _mix(x: UInt64) -> UInt64:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
