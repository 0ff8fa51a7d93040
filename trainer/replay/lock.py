"""One sampler per number and run directory: a file lock, which ends with the process that holds it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from trainer import errors
from trainer.data.shards import FULL_DISK, try_lock
from trainer.errors import UserError
from trainer.replay.told import Told

POLL_SECONDS = 0.2
LOCK_SECONDS = 5.0  # for a sampler that is just ending to let go of its lock


@contextmanager
def worker_lock(path: Path, wait: Callable[[str], bool]) -> Iterator[bool]:
    """Hold a sampler's lock. While that is not possible (another holds it, no room on the disk), `wait` is called with
    the reason between two tries; it returns whether to go on trying.

    Yields:
        Whether the lock is held.
    """
    while isinstance(file := _try(path), str):
        if not wait(file):
            yield False
            return
    with file:
        yield True


def stand_by(worker: int, stop: Told, alive: Callable[[], None]) -> Callable[[str], bool]:
    """What a supervised sampler does while another one of its number is at work."""
    said: set[str] = set()

    def wait(reason: str) -> bool:
        if reason not in said:
            said.add(reason)
            say(worker, f"{reason}; standing by")
        alive()
        return not stop.wait(POLL_SECONDS)

    return wait


def refuse(path: Path, worker: int, stop: Told) -> Callable[[str], bool]:
    """What one that a person started does: raise a UserError, once another that was just ending had time to."""
    deadline = time.monotonic() + LOCK_SECONDS

    def wait(reason: str) -> bool:
        if time.monotonic() > deadline:
            raise UserError(f"{path}: {reason}; key --worker {worker}")
        return not stop.wait(POLL_SECONDS)

    return wait


def say(worker: int, text: str) -> None:
    """A line in the sampler's log, unless that lies on a full disk."""
    errors.say(f"sampler {worker}: {text}")


def _try(path: Path) -> IO[str] | str:
    """The locked file, or why it could not be locked."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return os.strerror(error.errno)
    if not try_lock(file.fileno()):
        file.close()
        return "another sampler of this number serves the run directory"
    return file
