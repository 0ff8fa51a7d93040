"""How the elements of a sample are cut into programs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_THREADS = 128
SMALLEST_BLOCK = 128  # below it a ragged last program wastes less than programs that are too small


@dataclass(frozen=True)
class Blocks:
    """`count` programs of `size` consecutive places each cover `places` of them; `even` where none runs over."""

    size: int
    count: int
    even: bool
    num_warps: int


def cut(places: int, dtype: torch.dtype, size: int = 0) -> Blocks:
    """Programs for `places` (at least one) that each store `dtype`, 16 bytes of neighbours from each thread.

    The largest power of two that divides the places, up to MAX_THREADS threads' worth, so that nothing is masked.
    `size`, a power of two, is given by benchmarks alone.
    """
    per_thread = 16 // dtype.itemsize
    largest = per_thread * MAX_THREADS
    if not size:
        dividing = places & -places
        size = min(largest, dividing if dividing >= SMALLEST_BLOCK else 1 << (places - 1).bit_length())
    num_warps = max(1, min(MAX_THREADS, size // per_thread) // 32)
    return Blocks(size, -(-places // size), places % size == 0, num_warps)
