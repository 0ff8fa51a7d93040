"""`manifest.jsonl`: the journal of a replay pool, one line per event, appended by samplers and trainer alike.

A line says that a shard is published, or with an `event` (`redo`, `retired`) takes one publication back, naming its
`id`. Each line carries the CRC-32 of its content. One that was torn by a crash or a full disk, or has a bit that
flipped, counts as never written.
"""

from __future__ import annotations

import json
import os
import secrets
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.data.shards import append_line, drop_stale
from trainer.errors import UserError
from trainer.replay.decode import shard_name

MANIFEST_NAME = "manifest.jsonl"
MANIFEST_SCHEMA = 2
_CHECK = "check"


@dataclass(frozen=True)
class ShardLine:
    """What the manifest says of one published shard.

    `id` is another for each publication, also of the same shard. `sampler` is what was asked for, `micro_batch` how
    many trajectories were really sampled at once: made again with it, a shard has the same bytes. `evaluations` and
    `seconds` are what it cost to make. Of a labelled pool, `rejected` images were sampled and not used, and `lacking`
    counts by class the trajectories for which something else had to stand in.
    """

    id: str
    shard: int
    name: str
    count: int
    points: int
    bytes: int
    crc32: int
    sha256: str
    teacher_id: str
    sampler: dict[str, Any]
    micro_batch: int
    evaluations: int
    seconds: float
    worker: int
    rejected: int = 0
    lacking: dict[str, int] = field(default_factory=dict[str, int])
    schema: int = MANIFEST_SCHEMA


class Manifest:
    """A view of the journal that `refresh` brings up to date, reading only what was added.

    `shards` are those published and not taken back; `micro_batches` how each shard was sampled last, also one that is
    gone; `newest` the micro-batch in the last line of each worker. `evaluations`, `rejected` and `lacking` are sums
    over all publications, `redone` and `retired` count what was taken back.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / MANIFEST_NAME
        self._forget()

    def refresh(self) -> bool:
        """Read what is new; whether a shard was published since.

        A file that does not continue what was read (cut off, replaced, gone) is read again from its start.

        Raises:
            UserError: a line of another schema, naming the file.
        """
        before = self.shards
        try:
            drop_stale(self.path.parent)
            with self.path.open("rb") as file:
                if not self._continues(file.fileno()):
                    self._forget()
                    self._file = _identity(file.fileno())
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._forget()
            return False
        complete, newline, _ = data.rpartition(b"\n")
        if not newline:
            return False
        known = {line.id for line in before.values()}
        self._offset += len(complete) + 1
        lines = complete.split(b"\n")
        self._last = lines[-1] + b"\n"
        for line in lines:
            self._apply(line)
        return any(line.id not in known for line in self.shards.values())

    def publish(self, line: ShardLine) -> None:
        append_sealed(self.path, asdict(line))

    def redo(self, shard: int, id: str, reason: str) -> None:
        """Take back the publication `id` of a shard, which is corrupt; others stay."""
        self._take_back("redo", shard, id, reason=reason)

    def retire(self, shard: int, id: str) -> None:
        """Take back the publication `id` of a shard, which is no longer needed; others stay."""
        self._take_back("retired", shard, id)

    def _take_back(self, event: str, shard: int, id: str, **details: str) -> None:
        append_sealed(self.path, {"event": event, "shard": shard, "id": id, **details, "schema": MANIFEST_SCHEMA})

    def _forget(self) -> None:
        self.shards: dict[int, ShardLine] = {}
        self.micro_batches: dict[int, int] = {}
        self.newest: dict[int, int] = {}
        self.evaluations = self.rejected = self.redone = self.retired = 0
        self.lacking = Counter[str]()
        self._offset, self._last = 0, b""
        self._file: tuple[int, int] | None = None

    def _continues(self, descriptor: int) -> bool:
        """Whether this is the file that was read, with the last line that was read where it was."""
        last = os.pread(descriptor, len(self._last), self._offset - len(self._last))
        return self._file == _identity(descriptor) and last == self._last

    def _apply(self, line: bytes) -> None:
        content = unseal(line)
        if content is None:
            return
        if content.get("schema") != MANIFEST_SCHEMA:
            raise UserError(f"{self.path}: schema {content.get('schema')}, this program reads {MANIFEST_SCHEMA}")
        if "event" in content:
            self._apply_event(content)
        elif (entry := _entry(content)) is not None:
            self.shards[entry.shard] = entry
            self.micro_batches[entry.shard] = self.newest[entry.worker] = entry.micro_batch
            self.evaluations += entry.evaluations
            self.rejected += entry.rejected
            self.lacking.update(entry.lacking)

    def _apply_event(self, content: dict[str, Any]) -> None:
        shard = content.get("shard")
        if type(shard) is not int or shard not in self.shards or self.shards[shard].id != content.get("id"):
            return
        if content["event"] in ("redo", "retired"):
            del self.shards[shard]
            self.redone += content["event"] == "redo"
            self.retired += content["event"] == "retired"


def publications(directory: Path) -> list[ShardLine]:
    """Every shard that was published in a pool, in that order, with those taken back since; [] without a manifest."""
    try:
        lines = (directory / MANIFEST_NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    contents = [content for content in map(unseal, lines) if content is not None]
    entries = [_entry(content) for content in contents if "event" not in content]
    return [entry for entry in entries if entry is not None and entry.schema == MANIFEST_SCHEMA]


def new_id() -> str:
    """A name for one publication, never given twice."""
    return secrets.token_hex(8)


def seal(content: dict[str, Any]) -> bytes:
    """One line, without its end, that carries the CRC-32 of its content."""
    return _canonical(content | {_CHECK: zlib.crc32(_canonical(content))})


def unseal(line: bytes) -> dict[str, Any] | None:
    """A line's content; None where it is not what was written."""
    try:
        content = json.loads(line)
        check = content.pop(_CHECK)
        intact = type(check) is int and zlib.crc32(_canonical(content)) == check
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return content if intact else None


def append_sealed(path: Path, content: dict[str, Any]) -> None:
    """Append one sealed line. Raises OSError as `append_line` does."""
    append_line(path, seal(content))


def _entry(content: dict[str, Any]) -> ShardLine | None:
    """A publication; None where a field is missing, surplus or not what it can be."""
    try:
        entry = ShardLine(**content)
    except TypeError:
        return None
    for part in fields(ShardLine):
        value = getattr(entry, part.name)
        if type(value).__name__ != str(part.type).partition("[")[0]:
            return None
        if isinstance(value, int) and value < 0:
            return None
    if not all(label.isdecimal() and type(count) is int and count > 0 for label, count in entry.lacking.items()):
        return None
    return entry if entry.id and entry.name == shard_name(entry.shard) and entry.micro_batch else None


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
