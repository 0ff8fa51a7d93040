"""The shard schema: deterministic WebDataset tars, written atomically, and the index that describes them.

A sample is one key with several members `<key>.<extension>`. The bytes of a shard depend on its samples alone
(fixed times, owners and modes), so a shard made again is identical. Used by task shards, buffers and replay shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from trainer.errors import UserError

INDEX_NAME = "index.json"
DATASET_NAME = "dataset.json"
SCHEMA_VERSION = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]+")


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
    labels: list[int] = field(default_factory=list)

    @property
    def classes(self) -> list[int]:
        return sorted(set(self.labels))


@dataclass
class SplitIndex:
    """`index.json` of one split of one task: published last, so its presence says that the split is complete."""

    dataset: str
    split: str  # train or test
    task: int
    image_size: int
    channels: int
    format: str
    classes: list[int]
    shards: list[ShardEntry]
    schema: int = SCHEMA_VERSION

    @property
    def count(self) -> int:
        return sum(shard.count for shard in self.shards)


@dataclass
class DatasetCard:
    """`dataset.json` at the root: the names of the classes (a position is a class id) and the tasks built so far."""

    name: str
    image_size: int
    channels: int
    format: str
    classes: list[str]
    tasks: list[list[int]]
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
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
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
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a shard index ({error})") from None
    if index.schema != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {index.schema}, this program reads {SCHEMA_VERSION}: build the shards again")
    return index


def write_card(root: Path, card: DatasetCard) -> None:
    write_atomic(root / DATASET_NAME, json.dumps(asdict(card), indent=1).encode())


def read_card(root: Path) -> DatasetCard:
    """Raises UserError, naming the file, where it is missing or unreadable."""
    path = root / DATASET_NAME
    try:
        return DatasetCard(**_read_json(path))
    except TypeError as error:
        raise UserError(f"{path}: not a data set card ({error})") from None


def _padded(size: int) -> int:
    return (size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return content
