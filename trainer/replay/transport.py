"""Where the shards of a replay pool lie and how its journal is kept: files of the run directory, or a store's objects.

A store has neither rename nor append, but an object appears whole or not at all: a shard is one object, and each line
of the journal is another, whose name begins with the time, so that a listing shows what is new.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol

from trainer.data.cache import Cache, Wanted
from trainer.data.shards import append_line, drop_stale, read_regular, write_atomic
from trainer.replay.decode import Corrupt, shard_name
from trainer.replay.request import ReplayRequest, read_request
from trainer.run import RunDir
from trainer.store import Damaged, Missing, ObjectStore, Outage, Patience, Pause

LISTED_EVERY = 1.0  # seconds between two listings of a store's journal, which cost money
MANIFEST_NAME = "manifest.jsonl"
JOURNAL = "manifest"  # prefix of the objects that are lines
SHARDS = "shards"  # prefix of the others
LINE_LIMIT = 1 << 20  # bytes
MakeCache = Callable[[Pause], Cache]


class Journal(Protocol):
    """Lines that several processes append and read."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    def read(self) -> tuple[bool, list[bytes]]:
        """The lines that are new to this reader; True with all of them where the journal is another than before.

        Raises:
            UserError: a store refuses, or did not answer for too long.
        """
        ...

    def append(self, line: bytes) -> None:
        """Raises OSError of a disk, UserError of a store."""
        ...


class Transport(Protocol):
    """The shards of one pool by their numbers. Errors are those of `Journal`."""

    def open_journal(self) -> Journal:
        """For one reader, who begins at the first line."""
        ...

    @property
    def away(self) -> bool:
        """Whether a store does not answer just now."""
        ...

    def place(self, shard: int) -> str:
        """A shard's name for messages."""
        ...

    def put(self, shard: int, data: bytes) -> None:
        """Publish a shard's bytes, whole or not at all."""
        ...

    def get(self, shard: int, size: int, crc32: int) -> bytes:
        """Exactly these bytes. Raises OSError or Corrupt where there are others, or none."""
        ...

    def delete(self, shard: int) -> None:
        """Remove a shard; one that is not there is none."""
        ...

    def present(self) -> set[int]:
        """Shards that take room."""
        ...

    def tidy(self, mine: Callable[[int], bool]) -> None:
        """Remove what a writer that died left half done of some shards."""
        ...

    def interrupt(self) -> None:
        """End all waiting for a store in other threads."""
        ...


# --- files ------------------------------------------------------------------------------------------------------


class FileJournal:
    """One file; what was read of it is not read again, unless it does not continue what was read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._last = 0, b""
        self._file: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> tuple[bool, list[bytes]]:
        restarted = False
        try:
            drop_stale(self.path.parent)
            with self.path.open("rb") as file:
                if not self._continues(file.fileno()):
                    restarted = True
                    self._offset, self._last = 0, b""
                    self._file = _identity(file.fileno())
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            self._offset, self._last, self._file = 0, b"", None
            return True, []
        complete, newline, _ = data.rpartition(b"\n")
        if not newline:
            return restarted, []
        self._offset += len(complete) + 1
        lines = complete.split(b"\n")
        self._last = lines[-1] + b"\n"
        return restarted, lines

    def append(self, line: bytes) -> None:
        append_line(self.path, line)

    def _continues(self, descriptor: int) -> bool:
        """Whether this is the file that was read, with the last line that was read where it was."""
        last = os.pread(descriptor, len(self._last), self._offset - len(self._last))
        return self._file == _identity(descriptor) and last == self._last


class FilePool:
    """Files in a directory."""

    away = False

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def open_journal(self) -> FileJournal:
        return FileJournal(self.directory / MANIFEST_NAME)

    def path(self, shard: int) -> Path:
        return self.directory / shard_name(shard)

    def place(self, shard: int) -> str:
        return str(self.path(shard))

    def put(self, shard: int, data: bytes) -> None:
        write_atomic(self.path(shard), data)

    def get(self, shard: int, size: int, crc32: int) -> bytes:
        drop_stale(self.directory)
        data = read_offered(self.path(shard), size)
        _check_crc(data, crc32)
        return data

    def delete(self, shard: int) -> None:
        self.path(shard).unlink(missing_ok=True)

    def present(self) -> set[int]:
        return _numbers(path.name for path in self.directory.glob("replay-*.tar"))

    def tidy(self, mine: Callable[[int], bool]) -> None:
        for path in self.directory.glob(".replay-*.tmp"):
            number = path.name.removeprefix(".replay-").partition(".")[0]
            if number.isdecimal() and mine(int(number)):
                path.unlink(missing_ok=True)

    def interrupt(self) -> None:
        """A disk is not waited for here."""


# --- a store ----------------------------------------------------------------------------------------------------


class ObjectJournal:
    """An object for each line, under `manifest/`. Lines of this process are news at once, others' by a listing."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._seen: set[str] = set()
        self._own: list[bytes] = []
        self._listed = -LISTED_EVERY
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._store.place(JOURNAL)

    def read(self) -> tuple[bool, list[bytes]]:
        with self._lock:
            lines, self._own = self._own, []
        if time.monotonic() - self._listed < LISTED_EVERY:
            return False, lines
        found = self._store.sizes(JOURNAL)
        self._listed = time.monotonic()
        with self._lock:
            restarted = not self._seen <= found.keys()  # somebody removed the pool, or a part of it
            if restarted:
                self._seen, lines = set(), []
            new = sorted(found.keys() - self._seen)
        for name in new:
            if found[name] <= LINE_LIMIT:
                with suppress(Missing):  # removed between listing and reading: the next listing shows it
                    lines.append(self._store.read(f"{JOURNAL}/{name}"))
        with self._lock:
            self._seen.update(new)
        return restarted, lines

    def append(self, line: bytes) -> None:
        name = f"{time.time_ns():020d}-{secrets.token_hex(4)}"
        self._store.write(f"{JOURNAL}/{name}", line)
        with self._lock:
            self._seen.add(name)
            self._own.append(line)


class StorePool:
    """Objects under one prefix, read through the node's cache where there is one."""

    def __init__(self, store: ObjectStore, stop: threading.Event, cache: Cache | None = None) -> None:
        """`stop` is what the cache's waits heed."""
        self._store, self._stop, self._cache = store, stop, cache

    def open_journal(self) -> ObjectJournal:
        return ObjectJournal(self._store)

    @property
    def away(self) -> bool:
        return self._store.outage.now

    def place(self, shard: int) -> str:
        return self._store.place(_object(shard))

    def put(self, shard: int, data: bytes) -> None:
        self._store.write(_object(shard), data)

    def get(self, shard: int, size: int, crc32: int) -> bytes:
        assert self._cache is not None, "a sampler reads no shards"
        key = f"replay-{shard:06d}-{crc32:08x}-{size}.tar"
        wanted = Wanted(key, size, partial(self._store.fetch, _object(shard), size))
        try:
            with self._cache.opened(wanted) as descriptor:
                data = os.pread(descriptor, size, 0)
        except (Missing, Damaged) as error:
            raise Corrupt(str(error).removeprefix(f"{self.place(shard)}: ")) from None
        try:
            _check_crc(data, crc32)
        except Corrupt:
            self._cache.remove(key)  # the cache or the store: the next look tells
            raise
        return data

    def delete(self, shard: int) -> None:
        self._store.delete(_object(shard))

    def present(self) -> set[int]:
        return _numbers(self._store.sizes(SHARDS).keys())

    def tidy(self, mine: Callable[[int], bool]) -> None:
        """An object is whole, or is not there."""

    def interrupt(self) -> None:
        self._stop.set()
        self._store.interrupt()


def pools_url(store: str, run: RunDir) -> str:
    """The place of a run's pools in a store."""
    return f"{store.rstrip('/')}/{run.root.name}"


def pool_url(request: ReplayRequest, run: RunDir) -> str:
    """The place of a task's pool in a store: another for each run, task and teacher."""
    return f"{pools_url(request.store, run)}/task-{request.task:02d}-{request.teacher_id[:12]}"


def open_pool(
    run: RunDir,
    request: ReplayRequest,
    *,
    cache: MakeCache | None = None,
    pause: Pause | None = None,
    outage: Outage | None = None,
) -> Transport:
    """A task's pool, where its request says. `cache`: for who reads shards; `pause` and `outage`: see `ObjectStore`."""
    if not request.store:
        return FilePool(run.replay(request.task))
    patience, stop = Patience(request.store_timeout, request.request_timeout), threading.Event()
    store = ObjectStore(pool_url(request, run), patience, pause=pause, outage=outage)
    return StorePool(store, stop, cache(stop.wait) if cache else None)


def pool_of_task(run: RunDir, task: int) -> Transport:
    """The pool that a task had, where its request says; without one, what files there are."""
    request = run.replay_request(task)
    return open_pool(run, read_request(request)) if request.exists() else FilePool(run.replay(task))


def read_offered(path: Path, size: int) -> bytes:
    """A file of exactly `size` bytes. Raises OSError, or Corrupt for another size."""
    data = read_regular(path, size)
    if len(data) != size:
        raise Corrupt(f"{len(data)} bytes, {size} expected")
    return data


def _object(shard: int) -> str:
    return f"{SHARDS}/{shard_name(shard)}"


def _check_crc(data: bytes, crc32: int) -> None:
    if zlib.crc32(data) != crc32:
        raise Corrupt("its checksum is not the one of the manifest")


def _numbers(names: Iterable[str]) -> set[int]:
    """The shards among files or objects of these names."""
    found = (name.removeprefix("replay-").removesuffix(".tar") for name in names)
    return {int(number) for number in found if number.isdecimal()}


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino
