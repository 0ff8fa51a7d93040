"""A run that tests interrupt: forked ranks and, beside them, a sampler that is started again when it dies."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.position import checkpoints
from trainer.run import RunDir

from .conftest import TASKS, Workplace
from .zygote import Job, Ranks

SECONDS = 120.0  # that anything waited for may take on a busy machine
POLL_SECONDS = 0.005


class Run:
    """The run `runs/run` of two tasks in a folder of its own."""

    def __init__(self, path: Path, settings: Mapping[str, Any], *, steps: int, sampler: bool) -> None:
        """`settings` with replay.placement=external make `steps` steps of each task."""
        self.place = Workplace(path, settings)
        self.directory = RunDir(path / "runs" / "run")
        self.steps, self.needs_sampler = steps, sampler
        self.trainers: Ranks | None = None
        self.sampler: Job | None = None
        self.restarts = 0  # of the sampler

    def start(self, ranks: int, *arguments: str) -> Ranks:
        """Start, or go on; the run must not be going on."""
        if self.trainers is not None and self.trainers.wait(0) == 0:
            self.end_sampler()
        self.trainers = self.place.ranks(ranks, "run.name=run", TASKS, *arguments)
        self.keep_sampler()
        return self.trainers

    def wait_until(self, happened: Callable[[], bool]) -> bool:
        """Wait, keeping the sampler alive; False where the ranks ended, with code 0, before."""
        assert self.trainers is not None
        deadline = time.monotonic() + SECONDS
        while (code := self.trainers.poll()) is None:
            if happened():
                return True
            assert time.monotonic() < deadline, self.trainers.printed()
            self.keep_sampler()
            time.sleep(POLL_SECONDS)
        assert code == 0, self.trainers.printed()
        return False

    def conclude(self) -> None:
        """Wait for the end of the run; all that belongs to it then ends by itself."""
        self.wait_until(lambda: False)
        assert self.directory.metrics.exists()
        self.end_sampler()
        assert self.place.processes() == []

    def end_sampler(self) -> None:
        """Wait for the sampler, which ends by itself once the ranks have ended well."""
        if self.sampler is None:
            return
        if self.restarts:  # one that was started while the run ended gives it minutes to go on with another task
            self.sampler.send_signal(signal.SIGTERM)
        assert self.sampler.wait(SECONDS) in ((0, -signal.SIGTERM) if self.restarts else (0,)), self.sampler.printed()
        self.sampler = None

    def keep_sampler(self) -> None:
        """Start the sampler unless it lives, or has ended well."""
        if self.needs_sampler and (self.sampler is None or self.sampler.poll()):
            self.restarts += self.sampler is not None
            # What launch/teacher.py starts as its child; this class is the supervisor here.
            self.sampler = self.place.fork("../trainer/replay/__main__.py", "--run", "runs/run", "--by-hand")

    def check_orphans(self) -> None:
        """Once the ranks have ended, nothing but the sampler may be left."""
        sampler = {self.sampler.pid} if self.sampler else set()
        assert {process.pid for process in self.place.processes()} <= sampler

    def checkpointed(self) -> int:
        """Steps up to the newest checkpoint, over both tasks."""
        task, step = next(iter(checkpoints(self.directory, 2)), (0, 0))
        return max(0, (task - 1) * self.steps + step)
