"""Memory that is freed is there again without asking the kernel."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, resource, sys
from trainer.allocator import keep_freed_memory
kept = sys.argv[1] == "keep" and keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def touch():
    block = libc.malloc(48 << 20)
    libc.memset(block, 1, 48 << 20)
    libc.free(block)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    touch()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", SCRIPT, mode], check=True, capture_output=True, text=True, timeout=60)
    kept, count = map(int, done.stdout.split())
    return kept, count


def test_blocks_are_not_mapped_anew() -> None:
    kept, count = faults("keep")
    if not kept:
        pytest.skip("needs glibc")
    assert count < 100
    assert faults("leave")[1] > 1000, "five times 48 MB in pages of at most 4 KB to 64 KB"
