"""What the trainer tells its samplers, and where processes of a run can be recognised: small JSON files."""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.data.shards import write_atomic
from trainer.run import RunDir


@dataclass(frozen=True)
class State:
    """`state.json`: the task being learnt, whether the run has ended, and when that was written (Unix time)."""

    task: int
    finished: bool
    time: float


def write_state(run: RunDir, task: int, finished: bool = False) -> None:
    """Announce a task, after its replay request is written, or the end of the run. Atomic."""
    write_json(run.state, asdict(State(task, finished, time.time())))


def read_state(run: RunDir) -> State | None:
    """What the trainer said last; None before the first word."""
    content = read_json(run.state)
    task, finished, written = content.get("task"), content.get("finished"), content.get("time")
    if type(task) is not int or not 0 < task < 1 << 31 or type(finished) is not bool:
        return None
    if not isinstance(written, int | float) or not 0 <= written < 1e15:  # neither NaN nor infinite
        return None
    return State(task, finished, float(written))


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Publish a small file atomically. Raises OSError where the disk refuses."""
    write_atomic(path, json.dumps(content, separators=(",", ":")).encode())


def read_json(path: Path) -> dict[str, Any]:
    """A small file's object; empty where it is missing or not (yet) readable."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def process_alive(pid: int) -> bool:
    """Whether a process of this host runs (a zombie does not)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat_fields(pid)[:1] != ["Z"]


def writer_lives(status: dict[str, Any]) -> bool:
    """Whether the writer of a status file ("pid", "host") runs; of one on another host that cannot be seen."""
    host, pid = status.get("host"), status.get("pid")
    if not isinstance(host, str) or not isinstance(pid, int) or not 0 < pid < 1 << 31:
        return False
    return host != socket.gethostname() or process_alive(pid)


def process_started(pid: int) -> float:
    """Unix time at which a process of this host started, 10 ms precise; 0 where that cannot be told."""
    fields = _stat_fields(pid)
    try:
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - uptime + float(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError, ValueError):
        return 0.0


def _stat_fields(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat from the third (state) on; the second may hold blanks and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []
