"""Jobs done by several processes. What comes of them does not depend on how many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from data_tools.jobs import Advance, Job, perform
from trainer.errors import UserError

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
# A process works in one thread; numpy's libraries would start as many as there are cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


class Crew:
    """Up to `size` processes of `data_tools.worker`, started when there is work for them. One alone is this process.

    They are processes of their own rather than of multiprocessing, which would import the program's main module in
    each (torch, for a trainer that builds its data) and leave them behind a parent that is killed.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Kill them: after an error they are busy, and what they write is written whole or not at all."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    _close(stream)
        self._processes.clear()

    def run(self, jobs: Sequence[Job], advance: Advance) -> list[Any]:
        """Results in the order of the jobs.

        Raises:
            UserError, OSError: of a job; the others are not gone on with. Also a process that died.
        """
        if min(self._size, len(jobs)) <= 1:
            return [perform(job, advance) for job in jobs]
        while len(self._processes) < min(self._size, len(jobs)):
            self._processes.append(_start())
        results: dict[int, Any] = {}
        errors: list[Exception] = []
        waiting = list(enumerate(jobs))[::-1]

        def work(process: subprocess.Popen[str]) -> None:
            while not errors:
                try:
                    number, job = waiting.pop()
                except IndexError:
                    return
                try:
                    results[number] = _ask(process, job, advance)
                except (UserError, OSError) as error:
                    errors.append(error)

        threads = [threading.Thread(target=work, args=(process,), daemon=True) for process in self._processes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[number] for number in range(len(jobs))]


def _start() -> subprocess.Popen[str]:
    path = os.pathsep.join(part for part in (str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "data_tools.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
    )


def _ask(process: subprocess.Popen[str], job: Job, advance: Advance) -> Any:
    """The result of one job."""
    assert process.stdin is not None and process.stdout is not None
    with suppress(BrokenPipeError):  # its end is told below
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        answer = json.loads(line)
        if "done" in answer:
            advance(answer["done"])
        elif "result" in answer:
            return answer["result"]
        elif "wrong" in answer:
            raise UserError(answer["wrong"])
        else:
            raise OSError(answer["errno"], answer["text"], answer["file"])
    code = process.wait()
    why = f"was killed by signal {-code} (9: often for want of memory)" if code < 0 else f"ended with code {code}"
    raise UserError(f"a process that reads images {why}: the same command continues; --workers takes fewer")


def _close(stream: Any) -> None:
    with suppress(BrokenPipeError):
        stream.close()
