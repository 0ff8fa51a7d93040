"""One builder per root at a time. The lock ends with its process, however that ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.shards import try_lock
from trainer.errors import UserError

LOCK_NAME = ".lock"
PATIENCE = 3600.0  # seconds to wait for another builder of the same data set
INTERVAL = 0.2


@contextmanager
def root_lock(root: Path, patience: float = PATIENCE) -> Generator[None, None, None]:
    """Hold `<root>/.lock`; another process' build of the same root is waited for, and said so.

    Raises:
        UserError: it takes longer than `patience` seconds.
    """
    root.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        _acquire(descriptor, root, patience)
        yield
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, root: Path, patience: float) -> None:
    deadline = time.monotonic() + patience
    told = False
    while not try_lock(descriptor):
        if time.monotonic() >= deadline:
            raise UserError(f"{root / LOCK_NAME}: another build holds it for {patience:.0f} s; key data.root")
        if not told:
            print(f"{root}: waiting for another build of this data set", file=sys.stderr, flush=True)
            told = True
        time.sleep(INTERVAL)
