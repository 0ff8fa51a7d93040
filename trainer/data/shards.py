"""The shard schema: deterministic WebDataset tars, written atomically, and the index that describes them.

A sample is one key with several members `<key>.<extension>`. The bytes of a shard depend on its samples alone
(fixed times, owners and modes), so a shard made again is identical. Used by task shards, buffers and replay shards.
The image of a sample is one member: `png`, `jpg`, `webp`, or `npy` (raw uint8, shape (C,H,W)); its class is `cls`.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import tarfile
import threading
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from trainer.errors import UserError, one_line

INDEX_NAME = "index.json"
DATASET_NAME = "dataset.json"
SCHEMA_VERSION = 1
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,200}")
NAME_PATTERN = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,199}")  # of a shard's file
IMAGE_LIMIT = 4096  # pixels along an edge
MEMBER_LIMIT = 1 << 28  # bytes of one member: more than any image of that size has
INDEX_LIMIT = 1 << 30  # bytes of an index: ten million samples
# What tarfile raises for bytes that are no tar; its parsers of extended headers leak more than its own errors.
TAR_ERRORS = (tarfile.TarError, OSError, EOFError, ValueError, RecursionError, MemoryError)
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


def drop_stale(directory: Path) -> None:
    """List a directory: network file systems go on telling that a file is missing until somebody does."""
    with suppress(OSError):
        list(directory.iterdir())


def try_lock(descriptor: int) -> bool:
    """Take a file's exclusive lock, which ends with the descriptor; whether nobody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write under a temporary name, flush to disk, then rename: readers see nothing or all of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_native_id()}.tmp")
    try:
        with named(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


@contextmanager
def named(path: Path) -> Generator[None, None, None]:
    """Gives errors of a descriptor, which know no name, that of the file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def append_line(path: Path, line: bytes) -> None:
    """Append one line, given without its end, with a single write, and flush it to the disk.

    A torn tail, left by a writer that died, is closed first so that it cannot swallow this line.

    Raises:
        OSError: it did not fit, or not whole: then its beginning is such a tail.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = line + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            data = b"\n" + data
        with named(path):
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a shard index ({one_line(error)})") from None
    _check_schema(path, index.schema)
    _check_lists(path, index.classes, index.names)
    numbers = [index.task, index.image_size, index.channels, *index.classes]
    _check_fields(path, numbers, [index.dataset, index.split, index.format, *index.names], index.spec)
    _check_shape(path, index.image_size, index.channels)
    for number, entry in enumerate(index.shards):
        problem = _entry_problem(entry)
        if problem:
            raise UserError(f"{path}: shard {number}: {problem}")
    return index


def write_card(root: Path, card: DatasetCard) -> None:
    write_atomic(root / DATASET_NAME, json.dumps(asdict(card), indent=1).encode())


def read_card(root: Path) -> DatasetCard:
    """Raises UserError, naming the file, where it is missing or unreadable."""
    path = root / DATASET_NAME
    try:
        card = DatasetCard(**_read_json(path))
    except TypeError as error:
        raise UserError(f"{path}: not a data set card ({one_line(error)})") from None
    _check_schema(path, card.schema)
    _check_lists(path, card.classes, card.tasks)
    _check_lists(path, *card.tasks)
    ids = [class_id for task in card.tasks for class_id in task]
    _check_fields(path, [card.image_size, card.channels, *ids], [card.name, card.format, *card.classes], card.spec)
    _check_shape(path, card.image_size, card.channels)
    if not all(0 <= class_id < len(card.classes) for class_id in ids):
        raise UserError(f"{path}: a task has a class that is not one of the {len(card.classes)} named")
    return card


def check_shard(path: Path, entry: ShardEntry, *, sha256: bool) -> None:
    """Raise UserError, naming the file, where a shard is missing, of another size or (`sha256`) of other content."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: not a regular file")
        if status.st_size != entry.bytes:
            raise UserError(f"{path}: {status.st_size} bytes, {entry.bytes} expected")
        if sha256 and sha256_file(path) != entry.sha256:
            raise UserError(f"{path}: corrupt (its sha256 is not the one of the index)")
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error})") from None


def read_regular(path: Path, limit: int) -> bytes:
    """A small file's bytes; what a pipe or a device would give is never waited for.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > limit:
            raise OSError(errno.EFBIG, f"larger than {limit} bytes", str(path))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            return file.read(status.st_size)
    finally:
        os.close(descriptor)


def tar_members(tar: tarfile.TarFile, limit: int = MEMBER_LIMIT) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar, one after another.

    Raises:
        one of TAR_ERRORS: it is none, or its headers lead backwards (and would for ever) or claim absurd sizes.
    """
    end = 0
    while (member := tar.next()) is not None:
        if member.offset < end or not 0 <= member.size <= limit:
            raise tarfile.ReadError(f"member {one_line(repr(member.name))} claims {member.size} bytes")
        end = member.offset_data + member.size
        yield member


def _check_schema(path: Path, schema: object) -> None:
    if type(schema) is not int or schema != SCHEMA_VERSION:
        raise UserError(f"{path}: schema {one_line(schema)}, this program reads {SCHEMA_VERSION}: build elsewhere")


def _check_shape(path: Path, image_size: int, channels: int) -> None:
    if not 0 < image_size <= IMAGE_LIMIT or channels not in (1, 3):
        raise UserError(f"{path}: images of {channels} channels and size {image_size} are not possible")


def _check_lists(path: Path, *values: object) -> None:
    if not all(isinstance(value, list) for value in values):
        raise UserError(f"{path}: a field that should be a list is none")


def _check_fields(path: Path, numbers: Sequence[object], texts: Sequence[object], spec: object) -> None:
    """Refuse a file of ours whose fields are of other types than we write."""
    fit = all(_is_int64(number) for number in numbers) and all(isinstance(text, str) for text in texts)
    if not fit or not isinstance(spec, dict):
        raise UserError(f"{path}: a field has a wrong type")


def _is_int64(value: object) -> bool:
    """Whether it is a whole number (true and false are none) that fits arrays."""
    return type(value) is int and -(2**63) <= value < 2**63


def _entry_problem(entry: ShardEntry) -> str:
    """What is wrong with an entry read from a file; empty when it can be trusted to be well formed."""
    read: Any = entry  # its fields may hold anything
    if not isinstance(read.name, str) or not NAME_PATTERN.fullmatch(read.name):
        return "its name is not a plain file name"
    if not all(isinstance(values, list) for values in (read.keys, read.offsets, read.labels)):
        return "keys, offsets or labels are no lists"
    if not all(_is_int64(number) for number in (read.count, read.bytes, *read.labels)):
        return "count, bytes or a label is not a whole number"
    if not len(entry.keys) == len(entry.offsets) == entry.count or len(entry.labels) not in (0, entry.count):
        return "keys, offsets, labels and count do not agree"
    for number, (key, spans) in enumerate(zip(read.keys, read.offsets, strict=True)):
        if not isinstance(key, str) or not KEY_PATTERN.fullmatch(key) or not isinstance(spans, dict):
            return f"sample {number} is malformed"
        if not all(_valid_span(span, entry.bytes) for span in cast("dict[object, object]", spans).values()):
            return f"sample {one_line(key)}: a member lies outside the shard, or is larger than any image"
    return ""


def _valid_span(span: object, limit: int) -> bool:
    values = cast("list[object]", span) if isinstance(span, list) else []
    if len(values) != 2:
        return False
    first, size = values
    if not (isinstance(first, int) and isinstance(size, int)):
        return False
    return first >= 0 and 0 <= size <= MEMBER_LIMIT and first + size <= limit


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read a block at a time. Raises OSError, also for a pipe or a device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _padded(size: int) -> int:
    return (size + tarfile.BLOCKSIZE - 1) // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_regular(path, INDEX_LIMIT))
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object")
    return cast("dict[str, Any]", content)
