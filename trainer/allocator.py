"""The C library's allocator, set for training on CPUs."""

from __future__ import annotations

import ctypes

# Of mallopt(3), glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
FOR_EVER = 2**31 - 1
TOP_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Have freed memory kept for the next tensor instead of given back to the kernel; whether that could be done.

    Each step frees and allocates the same activations, whose pages the kernel would zero and map anew each time.
    PyTorch keeps a GPU's memory by itself.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    done = [mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, FOR_EVER), mallopt(M_TOP_PAD, TOP_PAD)]
    return done == [1, 1, 1]
