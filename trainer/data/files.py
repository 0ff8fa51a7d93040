"""Positioned reads from many files with a bounded number of open descriptors, from several threads."""

from __future__ import annotations

import os
import resource
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.config import Verify
from trainer.data.shards import SplitIndex, check_shard


def open_files_limit() -> int:
    """A quarter of the descriptors that this process may have; a task of ImageNet-100 has 130 shards."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 4096 if soft == resource.RLIM_INFINITY else max(1, min(soft // 4, 4096))


@dataclass
class _Handle:
    descriptor: int
    users: int = 0


class FilePool:
    """Keeps the files read last open; a file in use by another thread is never closed under it."""

    def __init__(self, limit: int | None = None) -> None:
        """`limit`: of files that stay open while nobody reads them."""
        self._limit = open_files_limit() if limit is None else limit
        self._lock = threading.Lock()
        self._handles: dict[Path, _Handle] = {}  # in the order of last use
        weakref.finalize(self, _close_all, self._handles)

    def read(self, path: Path, offset: int, size: int) -> bytes:
        """`size` bytes at `offset`; fewer at the end of the file. Raises OSError; a pipe is not waited for."""
        with self.opened(path) as descriptor:
            return os.pread(descriptor, size, offset)

    def check(self, directory: Path, index: SplitIndex, verify: Verify) -> None:
        """Raises UserError, naming the file, where a shard of an index is missing or damaged."""
        for entry in index.shards:
            check_shard(directory / entry.name, entry, sha256=verify is Verify.sha256)

    def name(self, path: Path) -> str:
        return str(path)

    def fetch_ahead(self) -> None:
        """Files are where they are."""

    def interrupt(self) -> None:
        """Nothing is waited for."""

    @property
    def open_files(self) -> int:
        return len(self._handles)

    @contextmanager
    def opened(self, path: Path) -> Generator[int, None, None]:
        """A descriptor for positioned reads. Raises OSError."""
        with self._lock:
            handle = self._handles.pop(path, None) or _Handle(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            self._handles[path] = handle
            handle.users += 1
        try:
            yield handle.descriptor
        finally:
            with self._lock:
                handle.users -= 1
                self._shrink()

    def _shrink(self) -> None:
        surplus = len(self._handles) - self._limit
        if surplus <= 0:
            return
        idle = [path for path, handle in self._handles.items() if not handle.users]
        for path in idle[:surplus]:
            os.close(self._handles.pop(path).descriptor)


def _close_all(handles: dict[Path, _Handle]) -> None:
    for handle in handles.values():
        os.close(handle.descriptor)
    handles.clear()
