"""The first process of a container: passes signals on, outlives what it started, says whether the run is finished.

A container ends with its first process, and with it all others at once. `deepspeed` as the first process would die of
the SIGTERM that a cluster sends before it takes a node away, and the ranks with it, unsaved. Its launcher would give
them 30 seconds. Here the signal goes to the ranks themselves, which save and end, however long that takes; the
container's own grace period is what bounds it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from trainer.cli import USER_ERROR
from trainer.errors import ConfigError
from trainer.run import RunDir
from trainer.settings import config_from_run
from trainer.standing import finished_result
from trainer.stop import STOP_SIGNALS

PR_SET_CHILD_SUBREAPER = 36
LAUNCHER = "deepspeed.launcher.launch"
LEFT_SECONDS = 90  # for what the command left behind to end; DeepSpeed's launcher gives a rank 30
NOT_FOUND = 127  # as shells say it
UNFINISHED = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from here


class First:
    """Runs a command in a process group of its own, to the end of all its processes."""

    def __init__(self, command: list[str]) -> None:
        """Raises OSError where the command cannot be started."""
        self.told = False
        self._code: int | None = None
        _adopt_orphans()
        for number in STOP_SIGNALS:
            signal.signal(number, self._pass_on)
        signal.signal(signal.SIGALRM, self._end_the_rest)
        self._child = subprocess.Popen(command, start_new_session=True)

    def wait(self) -> int:
        """The command's exit code, 128 + N for signal N, once no process is left of it."""
        while True:
            try:
                pid, status = os.wait()  # orphans, too, which are this process' children now
            except ChildProcessError:
                break
            if pid == self._child.pid:
                self._code = self._child.returncode = os.waitstatus_to_exitcode(status)
                if not self.told:  # a rank whose launcher was killed saves and ends, but a stray helper would stay
                    self._signal_group(signal.SIGTERM)
                signal.alarm(LEFT_SECONDS)
        signal.alarm(0)
        assert self._code is not None, "the command was waited for"
        return 128 - self._code if self._code < 0 else self._code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.told = True
        ranks = self._ranks()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            self._signal_group(number)

    def _ranks(self) -> list[psutil.Process]:
        """What DeepSpeed's launchers below the command have started."""
        found: list[psutil.Process] = []
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                    found += process.children() if LAUNCHER in process.cmdline() else []
        return found

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, number)

    def _end_the_rest(self, number: int, frame: FrameType | None) -> None:
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def run_to_end(command: list[str], run: Path | None) -> int:
    """Run a command to its end and return the container's exit code.

    With a run directory 0 says that the run is finished, and UNFINISHED that it is to be started again. A rank that was
    told to stop ends with 0, and so do the ranks of all other containers, which were not told: without a look at the
    result a cluster would take them for done.
    """
    try:
        first = First(command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        return NOT_FOUND
    code = first.wait()
    if run is None or code == USER_ERROR:
        return code
    if first.told:
        return UNFINISHED
    return code or (0 if is_finished(run) else UNFINISHED)


def is_finished(root: Path) -> bool:
    """Whether a run has learnt all that its own configuration asks for."""
    run = RunDir(root)
    try:
        return finished_result(run, config_from_run(run.config)) is not None
    except ConfigError:  # nothing was begun
        return False


def _adopt_orphans() -> None:
    """Also where a container's runtime has put a process of its own before this one."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
