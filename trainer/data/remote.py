"""Task shards that lie in a store: what small files say is copied, shards are fetched into the cache when needed.

Card and indexes are mirrored under the cache directory, so that whatever reads a built data set reads them there.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path

from trainer.config import DataConfig, Verify
from trainer.data.cache import KEYS, Cache, Wanted
from trainer.data.dataset import KEY, TaskData
from trainer.data.shards import (
    DATASET_NAME,
    INDEX_LIMIT,
    INDEX_NAME,
    ShardEntry,
    SplitIndex,
    read_card,
    task_directory,
    write_atomic,
)
from trainer.errors import UserError, say
from trainer.store import Damaged, Interrupted, ObjectStore, Outage, Patience, is_url

FETCHING_AHEAD = 4  # threads that fetch a task's shards before they are read
FETCHES = 3  # of an object whose bytes are not what the index says, before it counts as damaged
FIRST_CONTACT = 30.0  # seconds that a store may be away before the first step: more likely a wrong address
BLOCK = 1 << 20


def default_cache() -> Path:
    """Where the cache lies if `data.cache_dir` does not say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "palimpsest"


def cache_directory(data: DataConfig) -> Path:
    return Path(data.cache_dir) if data.cache_dir else default_cache()


def cache_bytes(data: DataConfig) -> int:
    return int(data.cache_gb * 1e9)


def open_cache(data: DataConfig, pause: Callable[[float], bool] | None = None) -> Cache:
    """The node's cache as configured. Raises UserError where it cannot be written."""
    return Cache(cache_directory(data), cache_bytes(data), data.store_timeout, pause)


def local_root(data: DataConfig) -> Path:
    """Where card and indexes of the data set can be read: its root, or the mirror of one in a store."""
    return remote_set(data).mirror if is_url(data.root) else Path(data.root)


def open_tasks(data: DataConfig, split: str, tasks: Sequence[int], verify: Verify = Verify.size) -> TaskData:
    """As `TaskData.open`, of a data set on the disk or in a store; of one in a store `verify` is `data.verify`."""
    if not is_url(data.root):
        return TaskData.open(Path(data.root), split, tasks, verify)
    remote = remote_set(data)
    remote.read_indexes(split, tasks)
    return TaskData.open(remote.mirror, split, tasks, verify, StoredShards(remote))


def remote_set(data: DataConfig) -> RemoteSet:
    """The data set of `data.root` in a store; one object for each in a process."""
    patience = Patience(data.store_timeout, data.request_timeout)
    return _remote_set(data.root, cache_directory(data), cache_bytes(data), data.verify, patience)


@lru_cache(maxsize=4)
def _remote_set(root: str, directory: Path, limit: int, verify: Verify, patience: Patience) -> RemoteSet:
    return RemoteSet(root, directory, limit, verify, patience)


class RemoteSet:
    """A data set in a store and its mirror; what this process has read of it is not asked for again."""

    def __init__(self, root: str, directory: Path, limit: int, verify: Verify, patience: Patience) -> None:
        self.root, self.directory, self.limit, self.verify, self.patience = root, directory, limit, verify, patience
        self.mirror = directory / "roots" / hashlib.sha256(root.encode()).hexdigest()[:16]
        # Each rank waits for itself; the first of a node speaks for them.
        self.outage = Outage(say if os.environ.get("LOCAL_RANK", "0") == "0" else lambda _: None)
        self._store = ObjectStore(root, patience, outage=self.outage)
        self._seen: set[str] = set()
        self._sizes: dict[str, dict[str, int]] = {}
        self._lock = threading.Lock()
        first = Patience(min(FIRST_CONTACT, patience.timeout), patience.request)
        self._copy(DATASET_NAME, ObjectStore(root, first, outage=self.outage))

    def store(self) -> ObjectStore:
        """A connection that can be interrupted by itself."""
        return ObjectStore(self.root, self.patience, outage=self.outage)

    def read_indexes(self, split: str, tasks: Sequence[int]) -> None:
        """Mirror the indexes of some tasks. Raises UserError, naming the object."""
        built = len(read_card(self.mirror).tasks)
        for task in tasks:
            if 1 <= task <= built:  # else the reader says what is wrong
                self._copy(str(task_directory(Path(), split, task) / INDEX_NAME), self._store)

    def sizes(self, prefix: str, names: Sequence[str]) -> dict[str, int]:
        """What lies under a prefix, as this process saw it first."""
        with self._lock:
            if prefix not in self._sizes:
                self._sizes[prefix] = self._store.sizes(prefix, names)
            return self._sizes[prefix]

    def _copy(self, name: str, store: ObjectStore) -> None:
        with self._lock:
            if name in self._seen:
                return
            try:
                content = store.read(name)
                if len(content) > INDEX_LIMIT:
                    raise UserError(f"{store.place(name)}: larger than {INDEX_LIMIT} bytes")
                write_atomic(self.mirror / name, content)
            except UserError as error:
                raise UserError(f"{error}; {KEY}") from None
            except OSError as error:
                raise UserError(f"{self.mirror}: cannot be written ({error.strerror}); {KEYS}") from None
            self._seen.add(name)


class StoredShards:
    """The shards of one opened data set: read from the cache, into which they are fetched. Thread-safe."""

    def __init__(self, remote: RemoteSet) -> None:
        self._remote, self._stop = remote, threading.Event()
        self._store = remote.store()
        self._cache = Cache(remote.directory, remote.limit, remote.patience.timeout, self._stop.wait)
        self._wanted: dict[Path, Wanted] = {}
        self._ahead: list[threading.Thread] = []

    def check(self, directory: Path, index: SplitIndex, verify: Verify) -> None:
        """Whether the store has the shards of an index, of the right size; their content is checked before it is used.

        Raises:
            UserError: naming the object, or because the cache cannot hold what is read in random order.
        """
        prefix = str(directory.relative_to(self._remote.mirror))
        found = self._remote.sizes(prefix, [entry.name for entry in index.shards])
        for entry in index.shards:
            name = f"{prefix}/{entry.name}"
            if entry.name not in found:
                raise UserError(f"{self._store.place(name)}: missing")
            if found[entry.name] != entry.bytes:
                raise UserError(f"{self._store.place(name)}: {found[entry.name]} bytes, {entry.bytes} expected")
            self._wanted[directory / entry.name] = self._describe(name, entry)
        total = sum(wanted.size for wanted in self._wanted.values())
        if total > self._remote.limit:
            raise UserError(
                f"data.cache_gb={self._remote.limit / 1e9:g}: {total / 1e9:.3g} GB of shards are read together, in "
                f"random order ({self._store.place(prefix)})"
            )

    def name(self, path: Path) -> str:
        """A shard's address, for messages."""
        return self._store.place(str(path.relative_to(self._remote.mirror)))

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """As `FilePool.read`."""
        with self.opened(path) as descriptor:
            return os.pread(descriptor, size, offset)

    @contextmanager
    def opened(self, path: Path) -> Generator[int, None, None]:
        """A descriptor for positioned reads. Raises UserError."""
        with self._cache.opened(self._wanted[path]) as descriptor:
            yield descriptor

    def fetch_ahead(self) -> None:
        """Begin to fetch all shards, several at a time; what fails is left for the reader to find and name."""
        waiting = iter(list(self._wanted.values()))
        lock = threading.Lock()

        def work() -> None:
            while not self._stop.is_set():
                with lock:
                    wanted = next(waiting, None)
                if wanted is None:
                    return
                try:
                    self._cache.ensure(wanted)
                except UserError:
                    return

        for _ in range(FETCHING_AHEAD):
            thread = threading.Thread(target=work, name="fetching", daemon=True)
            thread.start()
            self._ahead.append(thread)

    def interrupt(self) -> None:
        """End all waiting for the store: reads raise UserError from now on."""
        self._stop.set()
        self._store.interrupt()

    def _describe(self, name: str, entry: ShardEntry) -> Wanted:
        check = partial(_sha256_problem, entry.sha256) if self._remote.verify is Verify.sha256 else None
        return Wanted(f"{entry.sha256}.tar", entry.bytes, partial(self._fill, name, entry), check)

    def _fill(self, name: str, entry: ShardEntry, write: Callable[[bytes], object]) -> None:
        digest = hashlib.sha256()

        def take(data: bytes) -> None:
            digest.update(data)
            write(data)

        try:
            self._store.fetch(name, entry.bytes, take)
        except Interrupted:
            raise
        except UserError as error:
            raise UserError(f"{error}; {KEY}") from None
        if digest.hexdigest() != entry.sha256 and self._remote.verify is Verify.sha256:
            raise Damaged(f"{self._store.place(name)}: corrupt (its sha256 is not the one of the index); {KEY}")


def _sha256_problem(wanted: str, descriptor: int) -> str:
    """What is wrong with a cached file; empty where its content is as the index says."""
    digest, offset = hashlib.sha256(), 0
    while block := os.pread(descriptor, BLOCK, offset):
        digest.update(block)
        offset += len(block)
    return "" if digest.hexdigest() == wanted else "corrupt"
