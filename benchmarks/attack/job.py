"""A training command and all of its processes, found by a mark in their environment wherever they have got to."""

from __future__ import annotations

import contextlib
import copy
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

import psutil

ROOT = Path(__file__).resolve().parents[2]
MARK = "PALIMPSEST_CHAOS_JOB"
SIGNS = {"sampler": "trainer.replay", "launcher": "deepspeed.launcher.launch", "rank": "--local_rank="}
LONGEST_WORD = 200
FAREWELL = "the same command goes on from here"


class Command(Protocol):
    """A started command, as `subprocess.Popen` has it."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


class Job:
    """`deepspeed launch/train.py ...`, which may be started again and again; never twice at a time."""

    def __init__(self, arguments: list[str], ranks: int, port: int, logs: Path, name: str) -> None:
        """`ranks` 0: one process without a launcher. `logs` gets the output of each start, `<name>-<start>.txt`."""
        self.arguments, self.ranks, self.port, self.logs, self.name = arguments, ranks, port, logs, name
        self.starts = 0
        self.process: Command | None = None
        self.began = 0.0

    def start(self) -> None:
        """Give the command, in a session of its own."""
        self.starts += 1
        self.began = time.monotonic()
        self.log().touch()
        self.process = self.spawn()

    def spawn(self) -> Command:
        """The command itself, with the mark in its environment and its output in the log."""
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(self.ranks)]
        launcher += ["--master_port", str(self.port)]
        command = [sys.executable, *(launcher if self.ranks else []), str(ROOT / "launch" / "train.py")]
        with self.log().open("wb") as log:
            return subprocess.Popen(
                [*command, *self.arguments],
                env=os.environ | {MARK: self.mark, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def again(self, name: str) -> Job:
        """The same command, to be given by somebody else."""
        other = copy.copy(self)
        other.name, other.starts, other.process = f"{self.name}-{name}", 0, None
        return other

    @property
    def mark(self) -> str:
        return f"{os.getpid()}/{self.name}."

    @property
    def code(self) -> int | None:
        """Exit code of the command; None while it runs. Negative: ended by that signal."""
        return self.process.poll() if self.process else None

    def log(self, start: int = 0) -> Path:
        """Output of a start, counted from 1; of the latest with 0."""
        return self.logs / f"{self.name}-{start or self.starts}.txt"

    def output(self, start: int = 0) -> str:
        return self.log(start).read_text(errors="replace")

    def last_word(self) -> str:
        """What the latest start said of its end, after a colon: its error, traceback's last line or farewell."""
        lines = [line.strip() for line in self.output().splitlines()]
        told = [line for line in lines if re.match(r"error\b|\w+(Error|Exception)\b", line) or FAREWELL in line]
        return f": {told[-1][:LONGEST_WORD]}" if told else ""

    def members(self) -> list[psutil.Process]:
        """Every living process of the job, also one that has lost its parents."""
        found: list[psutil.Process] = []
        wanted = f"{MARK}={self.mark}\0".encode()
        for path in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError, psutil.Error):  # gone meanwhile, or another user's
                if wanted in path.read_bytes():
                    found.append(psutil.Process(int(path.parent.name)))
        return found

    def find(self, role: str) -> list[psutil.Process]:
        """The living processes of a role: rank, launcher, runner or sampler; ranks in their order."""
        found: list[psutil.Process] = []
        for member in self.members():
            with contextlib.suppress(psutil.Error):
                if self._role(member) == role:
                    found.append(member)
        return sorted(found, key=lambda member: member.pid)

    def _role(self, member: psutil.Process) -> str:
        """Empty for helpers, which come and go."""
        if self.process is not None and member.pid == self.process.pid:
            return "runner" if self.ranks else "rank"
        arguments = member.cmdline()
        return next((role for role, sign in SIGNS.items() if any(a.startswith(sign) for a in arguments)), "")

    def kill(self) -> None:
        """End every process of the job at once; nothing of it is left when this returns."""
        while members := self.members():
            for member in members:
                with contextlib.suppress(psutil.Error):
                    member.send_signal(signal.SIGKILL)
            psutil.wait_procs(members, timeout=5)
        if self.process is not None:
            self.process.wait()
