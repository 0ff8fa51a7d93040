"""Long-lived gloo ranks that run named cases: joining a world takes seconds, a case a fraction of one."""

from __future__ import annotations

import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
START_SECONDS = 120.0
LAUNCHER_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class CaseFailed(AssertionError):
    """A case raised on a rank (its traceback is the message), a rank died, or time ran out."""


class RankPool:
    """`size` ranks of one world, started at the first case; after a failed case the next one gets fresh ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._pending: list[bytearray] = []
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  open as long as the ranks

    def run(self, case: str, /, *, limit: float = 60.0, **arguments: Any) -> list[Any]:
        """Call `tests.distributed.cases.<case>(world, **arguments)` on every rank; their JSON results, by rank."""
        if not self._ranks:
            self._start()
        try:
            request = json.dumps({"case": case, "arguments": arguments}).encode() + b"\n"
            for rank in self._ranks:
                assert rank.stdin is not None
                rank.stdin.write(request)
                rank.stdin.flush()
            return self._answers(limit)
        except (CaseFailed, BrokenPipeError):
            self.stop()
            raise

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()
        self._ranks, self._pending = [], []

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environ = {name: value for name, value in os.environ.items() if name not in LAUNCHER_NAMES}
        environ |= {"WORLD_SIZE": str(self.size), "LOCAL_SIZE": str(self.size), "MASTER_ADDR": "127.0.0.1"}
        environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.distributed.worker"]
        for rank in range(self.size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            self._ranks.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environ | place,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                )
            )
        self._pending = [bytearray() for _ in self._ranks]
        self._answers(START_SECONDS)

    def _answers(self, limit: float) -> list[Any]:
        """One answer of each rank; a rank that waits for a failed one is not waited for."""
        deadline, answers = time.monotonic() + limit, dict[int, Any]()
        with selectors.DefaultSelector() as selector:
            for index, rank in enumerate(self._ranks):
                assert rank.stdout is not None
                selector.register(rank.stdout, selectors.EVENT_READ, index)
            while len(answers) < self.size:
                ready = selector.select(max(0.0, deadline - time.monotonic()))
                if not ready:
                    raise CaseFailed(f"no answer of ranks {set(range(self.size)) - set(answers)} within {limit} s")
                for key, _ in ready:
                    answer = self._read(key.data)
                    if answer is not None:
                        answers[key.data] = answer
                        selector.unregister(key.fileobj)
        return [answers[rank]["result"] for rank in range(self.size)]

    def _read(self, index: int) -> Any:
        """The rank's answer once its line is complete, else None."""
        stream = self._ranks[index].stdout
        assert stream is not None
        piece = os.read(stream.fileno(), 1 << 20)
        if not piece:
            self._errors.seek(0)
            raise CaseFailed(f"rank {index} died:\n{self._errors.read().decode(errors='replace')[-4000:]}")
        self._pending[index] += piece
        if not self._pending[index].endswith(b"\n"):
            return None
        answer = json.loads(bytes(self._pending[index]))
        self._pending[index].clear()
        if "traceback" in answer:
            raise CaseFailed(f"on rank {index}:\n{answer['traceback']}")
        return answer
