"""What ties a sampler to the supervisor that started it. No heavy import: this runs first in the child."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from trainer.lifeline import die_with_parent

PARENT_VARIABLE = "PALIMPSEST_PARENT"
SIGNS_VARIABLE = "PALIMPSEST_SIGNS"  # descriptor of the pipe that takes signs of life


def bind_to_parent() -> None:
    """Where a supervisor started this process, be killed by the kernel when the supervisor's thread ends.

    Done by the child itself, not between fork and exec, where a threaded parent can safely run no Python.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent and sys.platform.startswith("linux"):
        die_with_parent(int(parent))


def signs_of_life() -> Callable[[], None]:
    """What a sampler calls wherever it makes progress: the supervisor hears of it through a pipe, which needs no disk.

    Without a supervisor it does nothing.
    """
    number = os.environ.pop(SIGNS_VARIABLE, "")
    if not number:
        return lambda: None
    descriptor = int(number)
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)

    def sign() -> None:
        try:
            os.write(descriptor, b".")
        except (BlockingIOError, BrokenPipeError):  # enough are waiting there, or nobody listens any more
            return

    return sign
