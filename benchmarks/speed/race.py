"""A race: contenders are started, warmed up, timed in turns and profiled, for as long as there is time."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from speed.turns import Answer, Contender, ContenderFailed, Entry

BENCHMARKS = Path(__file__).resolve().parent.parent
LAST_SECONDS = 20.0  # kept for ending


class Race:
    """The contenders that have been started so far. A context manager, which ends them all."""

    def __init__(self, entries: Mapping[str, Entry], device: str, *, seconds: float, lanes: int) -> None:
        """`seconds` until everything is to be over; `lanes` contenders that are compiled warm up at a
        time."""
        self.entries, self.device, self.lanes = entries, device, lanes
        self.facts: dict[str, dict[str, Any]] = {}
        self.warm: dict[str, Answer] = {}
        self.failed: dict[str, str] = {}  # contenders that broke, and why
        self.skipped: list[str] = []  # what there was no time for
        self._running: dict[str, Contender] = {}
        self._built: set[str] = set()
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic() - LAST_SECONDS

    def enter(self, names: Iterable[str], steps: int) -> list[str]:
        """Build those that are not built yet and let them take `steps` first steps; all that are ready then.

        Raises:
            WrongResult: one of them computes something else than it should.
        """
        names = list(names)
        new = [name for name in names if name in self._running and name not in self._built]
        self._built |= set(new)
        # What compiles takes minutes of the CPU; what does not takes more of the device's memory.
        for lanes, eager in ((self.lanes, False), (1, True)):
            group = [name for name in new if self.entries[name].eager is eager]
            with ThreadPoolExecutor(lanes) as threads:
                list(threads.map(lambda name: self._try(name, lambda: self._first_steps(name, steps)), group))
        return self._here(names)

    def rounds(
        self, names: Sequence[str], rounds: int, settle: int, steps: int, seconds: float
    ) -> dict[str, list[Answer]]:
        """Timed rounds, in turns, of `steps` steps or as many as take about `seconds`; fewer where time runs out."""
        answers: dict[str, list[Answer]] = {name: [] for name in names}
        longest = 0.0
        for number in range(rounds):
            began = time.monotonic()
            if self.left < 1.5 * longest:
                self._skip(f"rounds {number + 1} to {rounds} of {', '.join(names)}")
                break
            here = self._here(names)
            for name in [here[(number + place) % len(here)] for place in range(len(here))]:
                self._try(name, lambda name=name: answers[name].append(self._ask(name, settle, steps, seconds)))
            longest = max(longest, time.monotonic() - began)
        return answers

    def profile(self, names: Sequence[str], steps: int) -> dict[str, Answer]:
        """Where the time of each goes."""
        answers: dict[str, Answer] = {}
        for name in self._here(names):
            if self.left < 0:
                self._skip(f"profile of {name}")
            else:
                self._try(name, lambda name=name: answers.update({name: self._profile(name, steps)}))
        return answers

    def leave(self, names: Iterable[str]) -> None:
        """End contenders."""
        for name in self._here(names):
            self._running.pop(name).close()

    def __enter__(self) -> Race:
        with environment(self.device):
            for name, entry in self.entries.items():
                self._running[name] = Contender(name, entry, self.device)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(list(self._running))

    def _here(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self._running]

    def _first_steps(self, name: str, steps: int) -> None:
        sys.stderr.write(f"{name}: being built, {self.left:.0f} s left\n")
        self.facts[name] = self._running[name].build(self._limit(name))["facts"]
        if not steps:
            return
        self.warm[name] = self._running[name].ask("warm", self._limit(name), steps=steps)
        self.facts[name] = self.warm[name]["facts"]

    def _ask(self, name: str, settle: int, steps: int, seconds: float) -> Answer:
        steps = max(1, min(steps, round(seconds / self.warm[name]["seconds"][-1])))
        settle = min(settle, steps)
        return self._running[name].ask("round", self._limit(name), settle=settle, steps=steps)

    def _profile(self, name: str, steps: int) -> Answer:
        return self._running[name].ask("profile", self._limit(name), steps=steps)

    def _try(self, name: str, work: Callable[[], object]) -> None:
        """Do something with a contender, which is out of the race where that fails."""
        try:
            work()
        except ContenderFailed as failure:
            self._running.pop(name).close(patience=1.0)
            self.failed[name] = str(failure)
            print(failure, file=sys.stderr, flush=True)

    def _limit(self, name: str) -> float:
        """Raises ContenderFailed where no time is left."""
        if self.left <= 0:
            raise ContenderFailed(f"{name}: no time was left")
        return self.left

    def _skip(self, what: str) -> None:
        self.skipped.append(what)
        print(f"no time: {what}", file=sys.stderr, flush=True)


@contextmanager
def environment(device: str) -> Generator[None, None, None]:
    """What contenders inherit: where to import from, before they are told, and with "cpu" that there is no GPU."""
    paths = [str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    changes = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "DIFFUSERS_VERBOSITY": "error"}
    changes |= {"DS_ACCELERATOR": device}  # DeepSpeed chooses while it is imported
    if device == "cpu":
        changes |= {"CUDA_VISIBLE_DEVICES": ""}
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
