"""Jobs forked from a process that has imported everything heavy: starting one takes a tenth of a second, not ten.

The process is multiprocessing's fork server. A job has a process id, a session, an output file and a working directory
of its own, and runs an entry point of launch/ as the interpreter would. It dies with the server, which dies with the
tests.
"""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import resource
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver
from pathlib import Path

import pytest

from trainer.lifeline import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
HEAVY = (
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "setuptools", "diffusers", "scipy.linalg"),
    *("matplotlib.backends.backend_agg", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "trainer.session"),
    *("trainer.replay.command", "trainer.replay.sidecar", "trainer.sampling", "trainer.reevaluation"),
)
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_PATIENCE = 30.0  # seconds that deepspeed's launcher gives a rank between SIGTERM and SIGKILL

_ports = itertools.cycle(range(20_000 + os.getpid() % 10_000, 32_000))
_context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Import what is heavy; the CPU alone, on which results are bit-equal whatever else the machine has."""
    _context.set_forkserver_preload(list(HEAVY))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}.items():
            patch.setenv(name, value)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("COLUMNS", "120")
        forkserver.ensure_running()


def run_job(script: str, arguments: list[str], directory: str, output: str, environ: dict[str, str]) -> None:
    """What a forked process does: what `python <script> <arguments>` in `directory` would."""
    assert all(name in sys.modules for name in HEAVY), "the fork server skips what it cannot import"
    assert len(list(Path(f"/proc/{os.getppid()}/task").iterdir())) == 1, "a fork would lose the server's other threads"
    gc.freeze()  # what is loaded stays: looking through it again and again costs each job a third of its time
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    die_with_parent(os.getppid())
    os.chdir(directory)
    for name in RANK_NAMES:
        os.environ.pop(name, None)
    os.environ.update(environ)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


class Job:
    """A forked process, with the methods of `subprocess.Popen` that tests use."""

    def __init__(
        self, script: str, arguments: Sequence[str], directory: Path, output: Path, environ: Mapping[str, str]
    ) -> None:
        path = str(ROOT / "launch" / script)
        self.output = output
        self.process = _context.Process(
            target=run_job, args=(path, list(arguments), str(directory), str(output), dict(environ)), daemon=True
        )
        self.process.start()
        assert self.process.pid is not None
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        """The exit code, negative after a signal; None while the process runs."""
        return self.process.exitcode

    def wait(self, timeout: float = 60.0) -> int:
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"process {self.pid} still runs after {timeout} s:\n{self.printed()}"
        return code

    def communicate(self, timeout: float = 60.0) -> tuple[str, None]:
        """Wait; all that was printed."""
        self.wait(timeout)
        return self.printed(), None

    def printed(self) -> str:
        return self.output.read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        self.send_signal(signal.SIGKILL)
        self.wait()


class Ranks:
    """The ranks of one job, and what deepspeed's launcher does with them: where one fails, the others are ended."""

    def __init__(self, start: Callable[[Mapping[str, str], Sequence[str]], Job], count: int) -> None:
        """`start` makes one rank from additions to its environment and its arguments. One rank has no launcher."""
        if count == 1:
            self.jobs = [start({}, ())]
            return
        common = {"WORLD_SIZE": count, "LOCAL_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.jobs = [
            start(
                {name: str(value) for name, value in {**common, "RANK": rank, "LOCAL_RANK": rank}.items()},
                (f"--local_rank={rank}",),
            )
            for rank in range(count)
        ]

    def poll(self) -> int | None:
        """None while ranks run; then 0, or the code of one that failed."""
        codes = [job.poll() for job in self.jobs]
        if any(codes):
            self.end()
            return next(code for code in codes if code)
        return None if None in codes else 0

    def wait(self, timeout: float = 60.0) -> int:
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < deadline, f"ranks still run after {timeout} s:\n{self.printed()}"
            running = [job.process.sentinel for job in self.jobs if job.poll() is None]
            connection.wait(running, timeout=1.0)
        return code

    def end(self) -> None:
        """SIGTERM, and later SIGKILL, to whichever ranks still run."""
        for job in self.jobs:
            job.send_signal(signal.SIGTERM)
        for job in self.jobs:
            job.process.join(LAUNCHER_PATIENCE)
            job.kill()

    def printed(self) -> str:
        return "\n".join(job.printed() for job in self.jobs)


def free_port() -> int:
    """Below the ports that systems give to outgoing connections, so that no other process is given it meanwhile."""
    while True:
        port = next(_ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
