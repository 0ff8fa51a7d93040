"""Being told to stop."""

from __future__ import annotations

import time

LOOK_SECONDS = 0.05


class Told:
    """A flag that a signal handler or another thread sets.

    Setting a `threading.Event` takes a lock that the code interrupted by the signal may hold, in `wait`: the process
    would stand still for ever.
    """

    def __init__(self) -> None:
        self._told = False

    def set(self, *_: object) -> None:
        """Also a signal handler."""
        self._told = True

    def is_set(self) -> bool:
        return self._told

    def wait(self, seconds: float) -> bool:
        """Sleep until told, at most so long; whether it was."""
        end = time.monotonic() + seconds
        while not self._told and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, LOOK_SECONDS))
        return self._told
