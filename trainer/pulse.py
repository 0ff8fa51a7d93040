"""The word that all ranks have with each other every few steps: on the host, small, and at the same steps everywhere.

Signals, failures and what replay is there are agreed upon here, so no rank ever begins a step that another does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from trainer.errors import ToldElsewhere, UserError, disk_error

INTERVAL_SECONDS = 0.5  # between two exchanges, about
LONGEST_INTERVAL = 16  # steps
STARVED_SECONDS = 0.05  # between two exchanges while the ranks wait for replay
STOP, FAILED, STEPS, HEAD = range(4)


class Ranks(Protocol):
    """What is needed of the training world."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def exchange(self, words: Sequence[int]) -> list[list[int]]: ...


class Replay(Protocol):
    """What is needed of a source of replay; see `trainer.replay.source.ReplaySource`."""

    @property
    def width(self) -> int: ...

    def words(self, step: int) -> list[int]: ...

    def heed(self, step: int, rows: Sequence[Sequence[int]]) -> int: ...

    def wait(self, step: int, seconds: float) -> None: ...


class Pulse:
    """Before each step: `may_begin`."""

    def __init__(self, world: Ranks, stop_wanted: Callable[[], bool], look: Callable[[], None]) -> None:
        """`stop_wanted`: whether this process was asked to stop; `look` raises UserError for what failed here."""
        self._world, self._stop_wanted, self._look = world, stop_wanted, look
        self._until = 0  # steps before this may begin
        self._last: tuple[int, float] | None = None  # step and time of the exchange before
        self._steps = 1  # between two exchanges: the main rank's word

    def may_begin(self, step: int, replay: Replay | None) -> bool:
        """Wait until all ranks can begin a step; False where one of them was asked to stop.

        Raises:
            UserError: on the rank that failed, ToldElsewhere on the others.
        """
        while step >= self._until:
            rows = self._exchange(step, replay)
            if any(row[STOP] for row in rows):
                return False
            self._steps = rows[0][STEPS]
            ready = step + self._steps if replay is None else replay.heed(step, [row[HEAD:] for row in rows])
            self._until = min(ready, step + self._steps)
            if step >= self._until and replay is not None:
                replay.wait(step, STARVED_SECONDS)
        return True

    def start(self) -> None:
        """A task begins: steps are counted anew."""
        self._until, self._last = 0, None

    def _exchange(self, step: int, replay: Replay | None) -> list[list[int]]:
        failure: UserError | None = None
        words = [0] * (replay.width if replay is not None else 0)
        try:
            self._look()
            if replay is not None:
                words = replay.words(step)
        except UserError as error:
            failure = error
        except OSError as error:
            failure = disk_error(error)
        rows = self._world.exchange([self._stop_wanted(), failure is not None, self._interval(step), *words])
        if any(row[FAILED] for row in rows):
            raise failure or ToldElsewhere("another rank failed")
        return rows

    def _interval(self, step: int) -> int:
        """Steps that take about INTERVAL_SECONDS, from how long those since the last exchange took."""
        now, last, self._last = time.monotonic(), self._last, (step, time.monotonic())
        if last is None or step == last[0]:
            return self._steps
        each = (now - last[1]) / (step - last[0])
        return min(max(int(INTERVAL_SECONDS / max(each, 1e-9)), 1), LONGEST_INTERVAL)
