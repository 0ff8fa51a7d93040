"""A sampler lives no longer than the supervisor that started it. No heavy import: this runs first in the child."""

from __future__ import annotations

import os
import sys

from trainer.lifeline import die_with_parent

PARENT_VARIABLE = "PALIMPSEST_PARENT"


def bind_to_parent() -> bool:
    """Where a supervisor started this process, be killed by the kernel when the supervisor's thread ends.

    Done by the child itself, not between fork and exec, where a threaded parent can safely run no Python.

    Returns:
        Whether there is a supervisor.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent and sys.platform.startswith("linux"):
        die_with_parent(int(parent))
    return bool(parent)
