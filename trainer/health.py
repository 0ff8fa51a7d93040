"""Whether a run makes progress, by the files that it writes: for the health checks of containers and clusters.

A process that hangs in a collective is alive all the same, and so is one whose peer has gone. What tells is that
nothing new appears in the run directory. Imports nothing that takes long: it is asked every minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.replay.state import process_started
from trainer.run import RunDir

FIRST_PROCESS = 1  # of a container; of a machine where there is none


@dataclass(frozen=True)
class Health:
    """`why`: a line for people."""

    good: bool
    why: str


def signs(run: RunDir, worker: int | None) -> Iterator[Path]:
    """What changes while a run goes on: of the trainer, or of sampler `worker`."""
    if worker is not None:
        yield run.sampler(worker)
        return
    yield from (run.metrics_log, run.state, run.metrics, run.report)
    for path in run.task(1).parent.glob("*"):
        yield path  # a file was published in it: a picture, the measures
        yield from (path / "checkpoints", path / "teacher", path / "replay" / "progress.json")


def newest_sign(runs: list[RunDir], worker: int | None) -> tuple[float, Path | None]:
    """When the runs last gave a sign (Unix time), and by which file; 0 and None where there was none."""
    newest: tuple[float, Path | None] = (0.0, None)
    for run in runs:
        for path in signs(run, worker):
            try:
                changed = path.stat().st_mtime
            except OSError:  # not there yet, or not any more
                continue
            newest = max(newest, (changed, path), key=lambda sign: sign[0])
    return newest


def judge(runs: list[RunDir], worker: int | None, within: float, since: float | None = None) -> Health:
    """Good where the last sign is younger than `within` seconds and younger than `since`.

    `since`: Unix time from which signs count, when this container was started by default: those that an earlier one
    left say nothing of this one.
    """
    since = process_started(FIRST_PROCESS) if since is None else since
    now = time.time()
    when, path = newest_sign(runs, worker)
    if path is None or when < since:
        return Health(False, f"no progress yet, {now - since:.0f} s after the start")
    age = max(0.0, now - when)
    return Health(age <= within, f"last progress {age:.0f} s ago ({path}); at most {within:.0f} s are taken for good")
