"""The shard schema: deterministic WebDataset tars, written atomically, and the index that describes them.

A sample is one key with several members `<key>.<extension>`. The bytes of a shard depend on its samples alone
(fixed times, owners and modes), so a shard made again is identical. Used by task shards, buffers and replay shards.
The image of a sample is one member: `png`, `jpg`, `webp`, or `npy` (raw uint8, shape (C,H,W)); its class is `cls`.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.errors import UserError

INDEX_NAME = "index.json"
DATASET_NAME = "dataset.json"
SCHEMA_VERSION = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")
LABEL_EXTENSION = "cls"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)  # errors that pass once there is room again


@dataclass(frozen=True)
class Sample:
    """One sample to write: members by extension ("png", "cls", "states.npy")."""

    key: str
    members: dict[str, bytes]


@dataclass
class ShardEntry:
    """What the index knows of one shard.

    `offsets[i][extension]` is `[first byte, size]` of that member of sample i in the tar.
    """

    name: str
    count: int
    bytes: int
    sha256: str
    crc32: int
    keys: list[str]
    offsets: list[dict[str, list[int]]]
    labels: list[int] = field(default_factory=list[int])

    @property
    def classes(self) -> list[int]:
        return sorted(set(self.labels))


@dataclass
class SplitIndex:
    """`index.json` of one split of one task: published last, so its presence says that the split is complete.

    `names` are the names of `classes`, in that order; `spec` says how the shards were made (`data_tools.build`).
    """

    dataset: str
    split: str  # train or test
    task: int
    image_size: int
    channels: int
    format: str
    classes: list[int]
    shards: list[ShardEntry]
    names: list[str] = field(default_factory=list[str])
    spec: dict[str, object] = field(default_factory=dict[str, object])
    schema: int = SCHEMA_VERSION

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


@dataclass
class DatasetCard:
    """`dataset.json` at the root: the names of the classes (a position is a class id) and the tasks built so far.

    `spec` says how the shards were made, so that a later build can tell whether it continues the same data set.
    """

    name: str
    image_size: int
    channels: int
    format: str
    classes: list[str]
    tasks: list[list[int]]
    spec: dict[str, object] = field(default_factory=dict[str, object])
    schema: int = SCHEMA_VERSION


def task_directory(root: Path, split: str, task: int) -> Path:
    """`<root>/<train|test>/task-<k>`; tasks count from 1."""
    return root / split / f"task-{task:02d}"


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, then rename: readers see nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def encode_shard(name: str, samples: Iterable[Sample], labels: list[int] | None = None) -> tuple[ShardEntry, bytes]:
    """Serialise samples to a tar.

    Raises:
        UserError: a key that webdataset would misread (a dot, a slash) or that occurs twice.
    """
    buffer = io.BytesIO()
    keys: list[str] = []
    offsets: list[dict[str, list[int]]] = []
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for sample in samples:
            if not KEY_PATTERN.fullmatch(sample.key):
                raise UserError(f"{name}: sample key {sample.key!r} may hold letters, digits, '_' and '-' only")
            keys.append(sample.key)
            spans: dict[str, list[int]] = {}
            for extension, data in sample.members.items():
                member = tarfile.TarInfo(f"{sample.key}.{extension}")
                member.size, member.mtime, member.mode = len(data), 0, 0o644
                tar.addfile(member, io.BytesIO(data))
                spans[extension] = [buffer.tell() - _padded(len(data)), len(data)]
            offsets.append(spans)
    if len(set(keys)) != len(keys):
        raise UserError(f"{name}: a sample key occurs twice")
    data = buffer.getvalue()
    entry = ShardEntry(
        name=name,
        count=len(keys),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        crc32=zlib.crc32(data),
        keys=keys,
        offsets=offsets,
        labels=labels or [],
    )
    return entry, data


def write_shard(path: Path, samples: Iterable[Sample], labels: list[int] | None = None) -> ShardEntry:
    """Write one shard atomically and describe it."""
    entry, data = encode_shard(path.name, samples, labels)
    write_atomic(path, data)
    return entry


def write_index(directory: Path, index: SplitIndex) -> None:
    write_atomic(directory / INDEX_NAME, json.dumps(asdict(index), separators=(",", ":")).encode())


def read_index(directory: Path) -> SplitIndex:
    """Raises UserError, naming the file, where it is missing, unreadable or of another schema."""
    path = directory / INDEX_NAME
    content = _read_json(path)
    try:
        shards = [ShardEntry(**entry) for entry in content.pop("shards")]
        index = SplitIndex(shards=shards, **content)
        _check_lists(path, index.classes, index.names)
        _check_fields(path, [index.task, index.image_size, index.channels, *index.classes], [index.split, *index.names])
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a shard index ({error})") from None
    if index.schema != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {index.schema}, this program reads {SCHEMA_VERSION}: build elsewhere")
    for entry in index.shards:
        problem = _entry_problem(entry)
        if problem:
            raise UserError(f"{path}: shard {entry.name!r}: {problem}")
    return index


def write_card(root: Path, card: DatasetCard) -> None:
    write_atomic(root / DATASET_NAME, json.dumps(asdict(card), indent=1).encode())


def read_card(root: Path) -> DatasetCard:
    """Raises UserError, naming the file, where it is missing or unreadable."""
    path = root / DATASET_NAME
    try:
        card = DatasetCard(**_read_json(path))
        _check_lists(path, card.classes, card.tasks, *card.tasks)
        _check_fields(path, [card.image_size, card.channels], [card.name, *card.classes])
        _check_fields(path, [class_id for task in card.tasks for class_id in task], [])
    except TypeError as error:
        raise UserError(f"{path}: not a data set card ({error})") from None
    if card.schema != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {card.schema}, this program reads {SCHEMA_VERSION}: build elsewhere")
    return card


def check_shard(path: Path, entry: ShardEntry, *, sha256: bool) -> None:
    """Raise UserError, naming the file, where a shard is missing, of another size or (`sha256`) of other content."""
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise UserError(f"{path}: {size} bytes, {entry.bytes} expected")
        if sha256 and sha256_file(path) != entry.sha256:
            raise UserError(f"{path}: corrupt (its sha256 is not the one of the index)")
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error})") from None


def _check_lists(path: Path, *values: object) -> None:
    if not all(isinstance(value, list) for value in values):
        raise UserError(f"{path}: a field that should be a list is none")


def _check_fields(path: Path, numbers: Sequence[object], texts: Sequence[object]) -> None:
    """Refuse a file of ours whose fields are of other types than we write."""
    if not all(isinstance(number, int) for number in numbers) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{path}: a field has a wrong type")


def _entry_problem(entry: ShardEntry) -> str:
    """What is wrong with an entry read from a file; empty when it can be trusted to be well formed."""
    read: Any = entry  # its fields may hold anything
    if not isinstance(read.name, str) or Path(entry.name).name != entry.name:
        return "its name is not a plain file name"
    if not all(isinstance(values, list) for values in (read.keys, read.offsets, read.labels)):
        return "keys, offsets or labels are no lists"
    if not all(isinstance(number, int) for number in (read.count, read.bytes, *read.labels)):
        return "count, bytes or a label is not a whole number"
    if not len(entry.keys) == len(entry.offsets) == entry.count or len(entry.labels) not in (0, entry.count):
        return "keys, offsets, labels and count do not agree"
    for key, spans in zip(read.keys, read.offsets, strict=True):
        if not isinstance(key, str) or not isinstance(spans, dict):
            return f"sample {key!r} is malformed"
        for span in cast("dict[object, object]", spans).values():
            if not _valid_span(span, entry.bytes):
                return f"sample {key!r}: member {span} lies outside the shard"
    return ""


def _valid_span(span: object, limit: int) -> bool:
    values = cast("list[object]", span) if isinstance(span, list) else []
    if len(values) != 2:
        return False
    first, size = values
    return isinstance(first, int) and isinstance(size, int) and first >= 0 <= size and first + size <= limit


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _padded(size: int) -> int:
    return (size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return cast("dict[str, Any]", content)
