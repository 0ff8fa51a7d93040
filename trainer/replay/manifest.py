"""`manifest.jsonl`: the journal of a replay pool, one line per event, appended by samplers and trainer alike.

A line says that a shard is published, or with an `event` (`redo`, `retired`) takes one publication back, naming its
`id`. Each line carries the CRC-32 of its content. One that was torn by a crash or a full disk, or has a bit that
flipped, counts as never written.
"""

from __future__ import annotations

import json
import secrets
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.replay.decode import shard_name
from trainer.replay.transport import MANIFEST_NAME, FileJournal, Journal

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

    def __init__(self, place: Path | Journal) -> None:
        """`place`: the pool's directory, or its journal wherever that lies."""
        self.journal = _journal(place)
        self._forget()

    @property
    def path(self) -> Path:
        """The journal's file."""
        assert isinstance(self.journal, FileJournal), "the lines lie in a store"
        return self.journal.path

    def refresh(self) -> bool:
        """Read what is new; whether a shard was published since.

        A file that does not continue what was read (cut off, replaced, gone) is read again from its start.

        Raises:
            UserError: a line of another schema, naming the file; a store that does not answer.
        """
        before = self.shards
        restarted, lines = self.journal.read()
        if restarted:
            self._forget()
        known = {line.id for line in before.values()}
        for line in lines:
            self._apply(line)
        return any(line.id not in known for line in self.shards.values())

    def publish(self, line: ShardLine) -> None:
        self.journal.append(seal(asdict(line)))

    def redo(self, shard: int, id: str, reason: str) -> None:
        """Take back the publication `id` of a shard, which is corrupt; others stay."""
        self._take_back("redo", shard, id, reason=reason)

    def retire(self, shard: int, id: str) -> None:
        """Take back the publication `id` of a shard, which is no longer needed; others stay."""
        self._take_back("retired", shard, id)

    def _take_back(self, event: str, shard: int, id: str, **details: str) -> None:
        self.journal.append(seal({"event": event, "shard": shard, "id": id, **details, "schema": MANIFEST_SCHEMA}))

    def _forget(self) -> None:
        self.shards: dict[int, ShardLine] = {}
        self.micro_batches: dict[int, int] = {}
        self.newest: dict[int, int] = {}
        self.evaluations = self.rejected = self.redone = self.retired = 0
        self.lacking = Counter[str]()
        self._early = set[str]()  # ids taken back before they were seen: clocks of hosts differ

    def _apply(self, line: bytes) -> None:
        content = unseal(line)
        if content is None:
            return
        if content.get("schema") != MANIFEST_SCHEMA:
            found = content.get("schema")
            raise UserError(f"{self.journal.name}: schema {found}, this program reads {MANIFEST_SCHEMA}")
        if "event" in content:
            self._apply_event(content)
        elif (entry := _entry(content)) is not None:
            if entry.id not in self._early:
                self.shards[entry.shard] = entry
            self.micro_batches[entry.shard] = self.newest[entry.worker] = entry.micro_batch
            self.evaluations += entry.evaluations
            self.rejected += entry.rejected
            self.lacking.update(entry.lacking)

    def _apply_event(self, content: dict[str, Any]) -> None:
        shard = content.get("shard")
        if type(shard) is not int or shard not in self.shards or self.shards[shard].id != content.get("id"):
            self._early.add(str(content.get("id")))
            return
        if content["event"] in ("redo", "retired"):
            del self.shards[shard]
            self.redone += content["event"] == "redo"
            self.retired += content["event"] == "retired"


def publications(place: Path | Journal) -> list[ShardLine]:
    """Every shard that was published in a pool, in that order, with those taken back since; [] without a manifest."""
    contents = [content for content in map(unseal, _journal(place).read()[1]) if content is not None]
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


def _journal(place: Path | Journal) -> Journal:
    return FileJournal(place / MANIFEST_NAME) if isinstance(place, Path) else place


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
