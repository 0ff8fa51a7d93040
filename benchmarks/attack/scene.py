"""A run under attack.

A fault is injected into a `Scene`; where that is not possible at the moment the function returns None. What follows is
asked of `Fault.followed` again and again until it has an answer.
"""

from __future__ import annotations

import contextlib
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

from attack.job import Job
from trainer.data.shards import FULL_DISK
from trainer.replay.manifest import MANIFEST_NAME
from trainer.replay.state import read_json, read_state
from trainer.run import RunDir

FOREIGN_TASK = 2  # whose pool's shards are put aside, to be put into later pools
FOREIGN_SHARDS = 200


@dataclass
class Fault:
    """One fault that was injected. `followed` says what became of it, None as long as that is open."""

    victim: str
    followed: Callable[[], str | None]
    ends: bool = False  # the job, so no other fault comes before that
    spares: bool = False  # the job, so no other fault may end it before this one is settled
    must: str = ""  # what is wrong where nothing has followed until the run is complete
    kind: str = ""  # a name in KINDS
    at: float = field(default_factory=time.monotonic)


@dataclass
class Scene:
    """A run under attack: what the faults act on and what they remember."""

    job: Job
    run: RunDir
    tasks: int
    random: random.Random
    hang_timeout: float
    limited: bool  # the run directory has a small disk of its own
    lost: list[str] = field(default_factory=list)  # promises that did not hold
    guests: list[Job] = field(default_factory=list)  # second starts
    foreign: dict[int, tuple[bytes, bytes]] = field(default_factory=dict)  # tars and lines of FOREIGN_TASK
    ballast_until: float = 0.0

    @property
    def task(self) -> int:
        """The task being learnt; 0 before the first."""
        state = read_state(self.run)
        return state.task if state else 0

    @property
    def manifest(self) -> Path:
        return self.run.replay(self.task) / MANIFEST_NAME

    @property
    def ballast(self) -> Path:
        return self.run.root / "ballast"

    def shards(self) -> list[Path]:
        """Shards on disk of the task being learnt, without those that the trainer has certainly done with."""
        progress = read_json(self.run.replay_progress(self.task))
        first = max(progress.get("released", 0), progress.get("used", 0))
        found = sorted(self.run.replay(self.task).glob("replay-*.tar"))
        return [path for path in found if number_of(path) > first]

    def lines(self) -> list[bytes]:
        """Lines of the manifest that are whole."""
        with contextlib.suppress(FileNotFoundError):
            return self.manifest.read_bytes().split(b"\n")[:-1]
        return []

    def look(self) -> None:
        """What has to be done all the time: keep the disk full, put shards of the first pool aside."""
        if self.ballast_until:
            if time.monotonic() < self.ballast_until:
                fill_disk(self.ballast)
            else:
                self.ballast_until = 0.0
                self.ballast.unlink(missing_ok=True)
        if self.task == FOREIGN_TASK and len(self.foreign) < FOREIGN_SHARDS:
            self._put_aside()

    def _put_aside(self) -> None:
        lines = {line.get("shard"): raw for raw in self.lines() if "crc32" in (line := parsed(raw))}
        for path in self.shards():
            if (number := number_of(path)) not in self.foreign and number in lines:
                with contextlib.suppress(FileNotFoundError):
                    self.foreign[number] = (path.read_bytes(), lines[number])

    def end(self) -> None:
        """Leave nothing running and no disk full."""
        for job in (self.job, *self.guests):
            job.kill()
        self.ballast.unlink(missing_ok=True)
        self.ballast_until = 0.0


Inject = Callable[[Scene], Fault | None]


@dataclass(frozen=True)
class Kind:
    """`up`, `down`: whether it can happen while the job runs, between two starts; `gentle`: the job goes on."""

    name: str
    inject: Inject
    up: bool = True
    down: bool = False
    gentle: bool = False


def number_of(shard: Path) -> int:
    return int(shard.stem.removeprefix("replay-"))


def parsed(line: bytes) -> dict[str, Any]:
    """A line of a manifest; empty where it is damaged."""
    try:
        content = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def fill_disk(path: Path) -> None:
    """Grow a file until not a byte is free."""
    with path.open("ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            _write_all(file, bytes(size))


def _write_all(file: FileIO, piece: bytes) -> None:
    """Write a piece as often as it fits."""
    try:
        while file.write(piece) == len(piece):
            pass
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
