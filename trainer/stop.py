"""Stopping on a signal: finish the step, save, say how to go on."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run was asked to stop and has saved where it stands."""

    def __init__(self, task: int, seen: int) -> None:
        self.task = task
        super().__init__(f"stopped and saved in task {task} after {seen} images; the same command goes on from here")


class StopRequest:
    """Set by a signal, looked at by the loop at steps that all ranks agree on."""

    def __init__(self) -> None:
        self.requested = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt  # a person who asks twice does not want to wait for the step
        self.requested = True
