"""Stopping on a signal: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop, and all that it has done is saved. The message says where it stands."""


GOES_ON = "the same command goes on from here"


class StopRequest:
    """Set by a signal, looked at where all ranks agree on what to do about it."""

    def __init__(self, wish: Path | None = None) -> None:
        """`wish`: a file by which another process of the job may ask for the same."""
        self.requested = False
        self._wish = wish
        self._interrupting = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def wanted(self) -> bool:
        """Whether this process was asked to stop."""
        return self.requested or (self._wish is not None and self._wish.exists())

    @contextmanager
    def interrupting(self) -> Generator[None, None, None]:
        """For work of this process alone that leaves nothing to save: a signal breaks it off.

        Raises:
            Stopped: at once if the signal came before.
        """
        self._interrupting = True
        try:
            if self.requested:
                self._break_off()
            yield
        finally:
            self._interrupting = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who asks twice does not want to wait for the step
        self.requested = True
        if self._interrupting:
            self._break_off()

    def _break_off(self) -> None:
        self._interrupting = False
        raise Stopped(f"stopped; all that was learnt is saved, {GOES_ON}")
