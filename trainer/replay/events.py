"""What went wrong or had to be mended while a run was served: counted over all attempts, told in metrics.json.

Each process appends to a file of its own, so that no two ever write to one, on whatever file system.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from enum import Enum
from typing import Any

from trainer.data.shards import FULL_DISK, append_line
from trainer.run import RunDir


class Event(str, Enum):
    """Kinds of events."""

    corrupt_shard = "corrupt_shard"  # not the bytes that its manifest line promises: made again
    foreign_shard = "foreign_shard"  # published by the sampler of another request or teacher: made again
    sampler_restart = "sampler_restart"
    sampler_hung = "sampler_hung"  # no sign of life: killed, then started again
    sampler_given_up = "sampler_given_up"
    out_of_memory = "out_of_memory"  # the sampler's micro-batch was halved
    disk_full = "disk_full"  # the sampler had to wait for room
    missing_class = "missing_class"  # a teacher of jdcl makes too few images of a class
    store_away = "store_away"  # an object store did not answer for a while
    damaged_checkpoint = "damaged_checkpoint"  # not loaded: an older one was


class EventLog:
    """Appends to one process's file, from any thread. Events that a full disk refuses are kept and written with a later
    one."""

    def __init__(self, run: RunDir, who: str) -> None:
        self.path = run.events(who)
        self._pending: list[bytes] = []
        self._lock = threading.Lock()

    def add(self, kind: Event, **details: Any) -> None:
        """Note an event with JSON values that say where and why."""
        content = {"time": round(time.time(), 3), "event": kind.value, **details}
        self._pending.append(json.dumps(content, separators=(",", ":")).encode())
        self.flush()

    def flush(self) -> None:
        """Write what is pending; on a full disk, keep it. Raises other OSErrors."""
        try:
            with self._lock:
                while self._pending:
                    append_line(self.path, self._pending[0])
                    self._pending.pop(0)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise


def read_events(run: RunDir) -> list[dict[str, Any]]:
    """All events of a run that can be read, process by process."""
    events: list[dict[str, Any]] = []
    for path in sorted(run.events("trainer").parent.glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                continue  # torn by a kill or a full disk
            if isinstance(content, dict) and isinstance(content.get("event"), str):
                events.append(content)
    return events


def count_events(run: RunDir) -> dict[str, int]:
    """How often each kind of event has happened, all kinds named."""
    counts = Counter(event["event"] for event in read_events(run))
    return {kind.value: counts[kind.value] for kind in Event}
