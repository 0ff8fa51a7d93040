"""`manifest.jsonl`: the journal of a replay pool, one line per event, appended by samplers and trainer alike.

A line with a `crc32` says that a shard is published; `redo` and `retired` lines take it back. A line counts once it
ends in a newline; what cannot be parsed (torn by a crash or a full disk) counts as never written.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from trainer.errors import UserError

MANIFEST_NAME = "manifest.jsonl"
MANIFEST_SCHEMA = 1


@dataclass(frozen=True)
class ShardLine:
    """What the manifest says of one published shard; `evaluations` and `seconds` are what it cost to make."""

    shard: int
    name: str
    count: int
    points: int
    bytes: int
    crc32: int
    sha256: str
    teacher_id: str
    sampler: dict[str, Any]
    evaluations: int
    seconds: float
    worker: int
    schema: int = MANIFEST_SCHEMA


class Manifest:
    """A view of the journal that `refresh` brings up to date, reading only what was added."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / MANIFEST_NAME
        self.shards: dict[int, ShardLine] = {}
        self.generation: dict[int, int] = {}  # times a shard was published
        self.evaluations = 0
        self.redone = 0
        self.retired = 0
        self._offset = 0

    def refresh(self) -> bool:
        """Read what is new; whether a shard was published since.

        Raises:
            UserError: lines of another schema, naming the file.
        """
        before = sum(self.generation.values())
        try:
            list(self.path.parent.iterdir())  # on network file systems this drops stale attributes
            with self.path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return False
        complete, _, _ = data.rpartition(b"\n")
        if complete:
            self._offset += len(complete) + 1
            for line in complete.split(b"\n"):
                self._apply(line)
        return sum(self.generation.values()) > before

    def publish(self, line: ShardLine) -> None:
        append_line(self.path, asdict(line))

    def redo(self, shard: int, generation: int, reason: str) -> None:
        """Take back what was published as `generation` of a shard; later ones stay."""
        append_line(self.path, {"event": "redo", "shard": shard, "generation": generation, "reason": reason})

    def retire(self, shard: int) -> None:
        append_line(self.path, {"event": "retired", "shard": shard})

    def _apply(self, line: bytes) -> None:
        try:
            content = json.loads(line)
            shard = int(content["shard"])
        except (ValueError, KeyError, TypeError, RecursionError):
            return  # torn
        event = content.get("event")
        if event == "redo":
            if content.get("generation") == self.generation.get(shard) and self.shards.pop(shard, None):
                self.redone += 1
        elif event == "retired":
            self.retired += self.shards.pop(shard, None) is not None
        else:
            entry = self._entry(content)
            self.shards[shard] = entry
            self.generation[shard] = self.generation.get(shard, 0) + 1
            self.evaluations += entry.evaluations

    def _entry(self, content: dict[str, Any]) -> ShardLine:
        if content.get("schema") != MANIFEST_SCHEMA:
            raise UserError(f"{self.path}: schema {content.get('schema')}, this program reads {MANIFEST_SCHEMA}")
        try:
            entry = ShardLine(**content)
        except TypeError as error:
            raise UserError(f"{self.path}: not a manifest of replay shards ({error})") from None
        for field in fields(ShardLine):
            value, kind = getattr(entry, field.name), str(field.type).partition("[")[0]
            if type(value).__name__ != kind:
                raise UserError(f"{self.path}: shard {entry.shard}: {field.name} is not of type {kind}")
        return entry


def append_line(path: Path, content: dict[str, Any]) -> None:
    """Append one line with a single write, then flush it to the disk. Raises OSError where it did not fit.

    A torn tail, left by a writer that died, is closed first so that it cannot swallow this line.
    """
    data = json.dumps(content, separators=(",", ":")).encode() + b"\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        if os.write(descriptor, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
