"""metrics.jsonl: one JSON object per line, appended for as long as a run lives, over all its attempts."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from trainer.data.shards import FULL_DISK
from trainer.errors import say


class MetricsLog:
    """Appends lines; each is one `write`, so a kill leaves at most the last line cut, which the next attempt removes.

    Use as a context manager, or call `close`. One writer at a time (the run directory's lock sees to it).
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_partial_line(path)
        self._path, self._warned = path, False
        self._torn: int | None = None  # where a line begins that did not fit and could not be taken back
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def append(self, event: str, values: Mapping[str, Any]) -> None:
        """Write one line: {"time" (Unix seconds), "event", **values}; NaN and infinity are written as null.

        On a full disk the line is dropped, all of it, and a warning printed the first time.
        """
        content = {"time": round(time.time(), 3), "event": event} | {key: _finite(v) for key, v in values.items()}
        line = (json.dumps(content, allow_nan=False) + "\n").encode()
        try:
            self._write(line)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise
            self._warn(f"{self._path}: {error.strerror}: lines are lost until there is room")

    def _write(self, line: bytes) -> None:
        """All of a line, or nothing of it. Raises OSError."""
        self._cut_torn_line()
        start = os.fstat(self._descriptor).st_size
        try:
            while line:
                line = line[os.write(self._descriptor, line) :]
        except OSError:
            self._torn = start
            self._cut_torn_line()
            raise

    def _cut_torn_line(self) -> None:
        if self._torn is not None:
            os.ftruncate(self._descriptor, self._torn)
            self._torn = None

    def _warn(self, text: str) -> None:
        if self._warned:
            return
        self._warned = True
        say(f"warning: {text}")

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log, oldest first; lines that are not JSON objects (cut by a kill) are passed over.

    A run resumed from a checkpoint logs what came after it again: the later line of a (task, seen) counts.
    """
    with path.open("rb") as file:
        for line in file:
            try:
                content = json.loads(line)
            except ValueError:
                continue
            if isinstance(content, dict):
                yield content


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut_partial_line(path: Path) -> None:
    """Drop what stands after the last line end."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 4096)
            file.seek(start)
            block = file.read(position - start)
            end = block.rfind(b"\n")
            if end >= 0:
                file.truncate(start + end + 1)
                return
            position = start
        file.truncate(0)
