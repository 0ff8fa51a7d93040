"""A directory of bounded size for what was fetched from stores; the processes of a node share it.

Files are named by their content, so none is ever stale, and come under a temporary name first. Locks on the files
themselves (flock) say who reads and who writes: they end with their process. The file used longest ago goes first.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from trainer.data.shards import try_lock
from trainer.errors import UserError
from trainer.seeds import hash_key

KEYS = "keys data.cache_dir, data.cache_gb"
POLL_SECONDS = 0.05
LOCK_FILES = 64  # of fetches; two objects that share one wait for each other
STAMP_SECONDS = 5.0  # between two notes that a file is used
FETCHES = 3  # of an object whose cached file turns out to be damaged
Fill = Callable[[Callable[[bytes], object]], None]  # writes a file's content, a part after the other
Check = Callable[[int], str]  # what is wrong with an open file; empty for one that is sound


@dataclass(frozen=True)
class Wanted:
    """A file by a name that stands for its content, its size, and where it comes from."""

    key: str
    size: int
    fill: Fill
    check: Check | None = None  # of a cached file, the first time that this process uses it


class Cache:
    """Thread-safe; several processes may use one directory. Files in use are never removed."""

    def __init__(
        self, directory: Path, limit: int, patience: float, pause: Callable[[float], bool] | None = None
    ) -> None:
        """`limit` in bytes. For as many seconds as `patience` one that is full, or where another process fetches the
        same, is waited for; `pause` is slept with, and says whether to give up."""
        self.directory, self.limit, self.patience = directory, limit, patience
        self._pause = pause or threading.Event().wait
        self._checked: set[str] = set()
        self._stamped: dict[str, float] = {}
        try:
            for part in (directory, self._files, self._locks):
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(directory, error) from None

    @contextmanager
    def opened(self, wanted: Wanted) -> Generator[int, None, None]:
        """A descriptor for positioned reads of a file, which is fetched where it is not there or damaged.

        Raises:
            UserError: it cannot be had, or the directory cannot be written.
        """
        descriptor = self._ready(wanted)
        try:
            self._stamp(wanted.key, descriptor)
            yield descriptor
        finally:
            os.close(descriptor)

    def ensure(self, wanted: Wanted) -> None:
        """Fetch a file that is not there, unless somebody is at it already."""
        with suppress(FileNotFoundError):
            if self._path(wanted.key).stat().st_size == wanted.size:
                return
        self._fetch(wanted, wait=False)

    def remove(self, key: str) -> None:
        """Forget a file that is damaged; who reads it reads on."""
        self._path(key).unlink(missing_ok=True)
        self._checked.discard(key)

    @property
    def bytes(self) -> int:
        """What lies there, and is being fetched."""
        return sum(size for _, size, _ in self._listed())

    # --- parts ---------------------------------------------------------------------------------------------------

    @property
    def _files(self) -> Path:
        return self.directory / "shards"

    @property
    def _locks(self) -> Path:
        return self.directory / "locks"

    def _path(self, key: str) -> Path:
        return self._files / key

    def _ready(self, wanted: Wanted) -> int:
        """A descriptor with a reader's lock on a sound file."""
        problem = ""
        for _ in range(FETCHES + 1):
            descriptor = self._open(wanted)
            if descriptor is None:
                self._fetch(wanted, wait=True)
                continue
            if wanted.check is None or wanted.key in self._checked:
                return descriptor
            problem = wanted.check(descriptor)
            if not problem:
                self._checked.add(wanted.key)
                return descriptor
            os.close(descriptor)
            self.remove(wanted.key)
        raise UserError(f"{self._path(wanted.key)}: {problem or 'gone as soon as it is fetched'}; {KEYS}")

    def _open(self, wanted: Wanted) -> int | None:
        try:
            descriptor = os.open(self._path(wanted.key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        fcntl.flock(descriptor, fcntl.LOCK_SH)  # who removes files holds its lock for a moment only
        if os.fstat(descriptor).st_size == wanted.size:
            return descriptor
        os.close(descriptor)
        self.remove(wanted.key)
        return None

    def _stamp(self, key: str, descriptor: int) -> None:
        now = time.monotonic()
        if now - self._stamped.get(key, -STAMP_SECONDS) >= STAMP_SECONDS:
            self._stamped[key] = now
            with suppress(OSError):
                os.utime(descriptor)

    def _fetch(self, wanted: Wanted, wait: bool) -> None:
        """Fetch a file under a lock, so that one process does it for all of the node."""
        try:
            with self._locked(f"{hash_key(wanted.key) % LOCK_FILES:02d}", wait) as held:
                if not held or self._path(wanted.key).exists():
                    return
                temporary, descriptor = self._room(wanted)
                try:
                    with os.fdopen(descriptor, "wb") as file:
                        wanted.fill(file.write)
                        file.flush()
                        temporary.replace(self._path(wanted.key))
                finally:
                    temporary.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def _room(self, wanted: Wanted) -> tuple[Path, int]:
        """A file of the wanted size under a temporary name, locked, for which older ones had to go."""
        if wanted.size > self.limit:
            raise UserError(
                f"{self.directory}: an object of {wanted.size / 1e9:.3g} GB does not fit into the cache; {KEYS}"
            )
        deadline = time.monotonic() + self.patience
        while True:
            with self._locked("room", True):
                if self._evict(self.limit - wanted.size):
                    return self._reserve(wanted)
            if time.monotonic() >= deadline or self._pause(POLL_SECONDS):
                raise UserError(f"{self.directory}: full of files that are in use; {KEYS}")

    def _evict(self, limit: int) -> bool:
        """Remove what was used longest ago until no more than `limit` bytes are left; whether that was possible."""
        listed = sorted(self._listed())
        total = sum(size for _, size, _ in listed)
        for _, size, path in listed:
            left_over = path.name.startswith(".")  # of a process that died; one at work has a lock on it
            if (total > limit or left_over) and _unlink_unused(path):
                total -= size
        return total <= limit

    def _reserve(self, wanted: Wanted) -> tuple[Path, int]:
        temporary = self._path(f".{wanted.key}.{os.getpid()}-{threading.get_native_id()}")
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, wanted.size)
        return temporary, descriptor

    def _listed(self) -> list[tuple[float, int, Path]]:
        """When each file was used last, its size, and its path."""
        found: list[tuple[float, int, Path]] = []
        for entry in os.scandir(self._files):
            with suppress(FileNotFoundError):
                status = entry.stat()
                found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    @contextmanager
    def _locked(self, name: str, wait: bool) -> Generator[bool, None, None]:
        """Hold a lock over all processes and threads of the node; whether it is held, where it is not waited for."""
        deadline = time.monotonic() + self.patience
        descriptor = os.open(self._locks / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while not (held := try_lock(descriptor)) and wait:
                if time.monotonic() >= deadline or self._pause(POLL_SECONDS):
                    raise UserError(f"{self._locks / name}: another process has been fetching for too long; {KEYS}")
            yield held
        finally:
            os.close(descriptor)


def _unlink_unused(path: Path) -> bool:
    """Remove a file that nobody has locked."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    try:
        if not try_lock(descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _unwritable(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory}: cannot be written ({error.strerror or error}); {KEYS}")
