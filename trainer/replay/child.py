"""What ties a sampler to the supervisor that started it. No heavy import: this runs first in the child."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType

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


@contextmanager
def imports_are_progress(sign: Callable[[], None]) -> Generator[None, None, None]:
    """Inside, `sign` is called for each module that is looked for: torch and diffusers take seconds on an idle
    machine, minutes on a starved one or from a slow disk, which must not pass for a hang."""
    finder = _Progress(sign)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _Progress:
    """An import hook that finds nothing."""

    def __init__(self, sign: Callable[[], None]) -> None:
        self._sign = sign

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        self._sign()
        return None
