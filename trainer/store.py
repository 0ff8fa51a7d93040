"""Objects in a store (s3://, gs://, https://), through fsspec: every request has a time limit and is tried again.

A store that does not answer is waited for, with exponential back-off, and said so in one line; one that refuses is an
error at once. Credentials come from the environment alone, as each store's own library looks for them.
"""

from __future__ import annotations

import asyncio
import errno
import importlib
import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.asyn import sync
from fsspec.exceptions import FSTimeoutError

from trainer.errors import ConfigError, UserError, one_line, say

T = TypeVar("T")
Pause = Callable[[float], bool]  # waits so many seconds; whether to give up
# Scheme, the package that reads it, and the extra of this program that installs it.
PACKAGES = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "http": ("aiohttp", "http"),
    "https": ("aiohttp", "http"),
    "memory": ("fsspec", ""),
    "file": ("fsspec", ""),
}
READ_ONLY = ("http", "https")
CHUNK = 1 << 24  # bytes of one request of a large object: a request's time limit is one for its size
CONNECT_SECONDS = 10.0
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between two tries
SAID_AFTER = 1.0  # seconds; what passes sooner is no outage
LISTED_AT_ONCE = 8  # requests for the sizes of objects in a store that has no listing
# Of botocore's own errors (a refusal by the server is an OSError): those of a connection, which pass.
_BOTO_PASSING = ("ConnectionError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError")


class Missing(UserError):
    """There is no such object, or no such bucket."""


class Interrupted(UserError):
    """Waiting for a store was given up because its user ends."""


class Damaged(UserError):
    """An object that is not what was said of it, however often it is fetched."""


@dataclass(frozen=True)
class Patience:
    """Seconds that a store may be away (`data.store_timeout`) and that one request may take
    (`data.request_timeout`)."""

    timeout: float
    request: float


def is_url(place: str) -> bool:
    """Whether a configured place lies in a store; else it is a path."""
    return "://" in place


def check_url(key: str, url: str, *, write: bool = False) -> None:
    """Refuse a place that cannot be used.

    Raises:
        ConfigError: naming the key, and never what may be a credential.
    """
    parts = urlsplit(url)
    shown = f"{key}={parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(
            f"{shown}: a place with credentials or a query; give them in the environment (docs/object-store.md)"
        )
    if parts.scheme not in PACKAGES:
        raise ConfigError(f"{shown}: no such kind of store; s3, gs and https are known")
    if write and parts.scheme in READ_ONLY:
        raise ConfigError(f"{shown}: cannot be written; take s3 or gs")
    if not (parts.netloc or parts.path.strip("/")):
        raise ConfigError(f"{shown}: names no bucket")
    package, extra = PACKAGES[parts.scheme]
    try:
        importlib.import_module(package)
    except ImportError:
        raise ConfigError(f"{shown}: needs {package}: pip install 'palimpsest[{extra}]'") from None


class Outage:
    """Whether a store answers, over all threads of a process; said once when it stops and when it is back."""

    def __init__(self, notice: Callable[[str], None] = say) -> None:
        self.notice = notice
        self.ended: Callable[[float], None] = lambda seconds: None  # called with the seconds of each outage
        self._since: float | None = None
        self._lock = threading.Lock()

    @property
    def now(self) -> bool:
        """Whether it does not answer just now."""
        return self._since is not None

    def begins(self, text: str, waited: float) -> None:
        """Something has failed for `waited` seconds."""
        with self._lock:
            if self._since is not None or waited < SAID_AFTER:
                return
            self._since = time.monotonic() - waited
        self.notice(text)

    def ends(self, url: str) -> None:
        if self._since is None:
            return
        with self._lock:
            if self._since is None:
                return
            seconds, self._since = time.monotonic() - self._since, None
        self.notice(f"{url}: answers again, after {seconds:.1f} s")
        self.ended(round(seconds, 3))


class ObjectStore:
    """Objects by name under one address. Thread-safe."""

    def __init__(
        self, url: str, patience: Patience, *, pause: Pause | None = None, outage: Outage | None = None
    ) -> None:
        """`pause` is slept with between two tries; by default until `interrupt` is called."""
        self.url, self.patience = url.rstrip("/"), patience
        self.outage = outage or Outage()
        self._stop = threading.Event()
        self._pause = pause or self._stop.wait
        self.scheme = urlsplit(url).scheme
        self._fs: Any = _open(self.scheme, patience)
        self._base = str(self._fs._strip_protocol(self.url)).rstrip("/")
        self._passing, self._refusing = _errors(self.scheme)

    def place(self, name: str) -> str:
        """An object's address, for messages."""
        return f"{self.url}/{name}"

    def interrupt(self) -> None:
        """End all waiting in other threads: it raises Interrupted, now and later."""
        self._stop.set()

    def read(self, name: str) -> bytes:
        """All of a small object.

        Raises:
            Missing: there is none.
            UserError: the store refuses, or did not answer for as long as it may be away; one line naming the object.
        """
        return self._persist(name, lambda: self._call("cat_file", self._path(name)))

    def fetch(self, name: str, size: int, write: Callable[[bytes], object]) -> None:
        """Give an object of `size` bytes to `write`, a part after the other.

        Raises:
            Damaged: it has another size. Else as `read`.
        """
        start = 0
        while start < size:
            stop = min(start + CHUNK, size)
            data = self._persist(name, lambda first=start, last=stop: self._part(name, first, last, size))
            write(data)
            start += len(data)

    def write(self, name: str, data: bytes) -> None:
        """Publish an object: readers see nothing or all of it. Raises UserError as `read` does."""
        self._persist(name, lambda: self._call("pipe_file", self._path(name), data))

    def delete(self, name: str) -> None:
        """Remove an object; one that is not there is none. Raises UserError as `read` does."""
        try:
            self._persist(name, lambda: self._call("rm_file", self._path(name)))
        except Missing:
            return

    def sizes(self, prefix: str, names: Sequence[str] = ()) -> dict[str, int]:
        """Objects `<prefix>/...` by the rest of their names, and their bytes; no entry for what is not there.

        A web server has no listing: it is asked for each of `names`, which no other store needs.

        Raises:
            UserError: as `read` does.
        """
        if self.scheme in READ_ONLY:
            return self._asked(prefix, names)
        path = self._path(prefix)
        try:
            found = self._persist(prefix, lambda: self._call("find", path, detail=True))
        except Missing:
            if self.scheme in ("memory", "file"):
                return {}
            raise  # the bucket: an empty prefix of one that exists is no error
        return {str(name)[len(path) + 1 :]: int(entry["size"]) for name, entry in found.items()}

    # --- parts ---------------------------------------------------------------------------------------------------

    def _asked(self, prefix: str, names: Sequence[str]) -> dict[str, int]:
        def size(name: str) -> int | None:
            try:
                return self._persist(name, lambda: self._call("info", self._path(f"{prefix}/{name}")))["size"]
            except Missing:
                return None

        with ThreadPoolExecutor(LISTED_AT_ONCE) as threads:
            return {name: found for name, found in zip(names, threads.map(size, names), strict=True) if found}

    def _part(self, name: str, start: int, stop: int, size: int) -> bytes:
        """Bytes [start, stop), or all of an object from a server that knows no ranges."""
        path = self._path(name)
        try:
            data: bytes = self._call("cat_file", path, start=start, end=stop)
        except OSError as error:
            if isinstance(error, FileNotFoundError | PermissionError):
                raise
            self._check_size(name, size)  # a range that does not lie within it
            raise
        if len(data) == stop - start:
            return data
        if len(data) == size:
            return data[start:]
        self._check_size(name, size)
        raise OSError(f"{len(data)} bytes came, {stop - start} expected")

    def _check_size(self, name: str, size: int) -> None:
        found = self._call("info", self._path(name))["size"]
        if found is not None and found != size:
            raise Damaged(f"{self.place(name)}: {found} bytes, {size} expected")

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """One request, ended after its time limit."""
        if not self._fs.async_impl:
            return getattr(self._fs, method)(*arguments, **options)
        work = getattr(self._fs, f"_{method}")
        return sync(self._fs.loop, work, *arguments, timeout=self.patience.request, **options)

    def _persist(self, name: str, work: Callable[[], T]) -> T:
        """Do something until it works, or has failed for too long."""
        began, tries = time.monotonic(), 0
        while True:
            if self._stop.is_set():
                raise Interrupted(f"{self.place(name)}: given up")
            try:
                result = work()
            except self._refusing as error:
                raise self._refusal(name, error) from None
            except self._passing as error:
                if _refused(error):
                    raise self._refusal(name, error) from None
                reason = self._reason(error)
            else:
                self.outage.ends(self.url)
                return result
            self._wait(name, reason, time.monotonic() - began, tries)
            tries += 1

    def _wait(self, name: str, reason: str, waited: float, tries: int) -> None:
        limit = self.patience.timeout
        if waited >= limit:
            raise UserError(
                f"{self.place(name)}: the store has not answered for {waited:.0f} seconds ({reason}); "
                f"data.store_timeout={limit:g}; the same command goes on from here"
            )
        told = f"{self.place(name)}: {reason}; trying again for up to {limit:g} s (data.store_timeout)"
        self.outage.begins(told, waited)
        longest = min(FIRST_PAUSE * 2**tries, LONGEST_PAUSE)
        # Jitter, so that many ranks do not all come back at once; the store is asked a last time at the limit.
        if self._pause(min(longest * random.uniform(0.5, 1.0), max(0.01, limit - waited))):
            raise Interrupted(f"{self.place(name)}: given up")

    def _reason(self, error: BaseException) -> str:
        """What went wrong, in a few words: where a server says nothing, the code that it gave."""
        if isinstance(error, FSTimeoutError | TimeoutError | asyncio.TimeoutError):
            return f"no answer within data.request_timeout={self.patience.request:g} s"
        response = getattr(error.__cause__, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        said = "" if error.args and error.args[-1] is None else one_line(error)
        return said or str(code or type(error).__name__)

    def _refusal(self, name: str, error: BaseException) -> UserError:
        reason = self._reason(error)
        if isinstance(error, FileNotFoundError):
            bucket = "NoSuchBucket" in reason or "bucket does not exist" in reason
            return Missing(f"{self.place(name)}: missing{f' ({reason})' if bucket else ''}")
        return UserError(f"{self.place(name)}: refused ({reason}); are place and credentials right?")


def _open(scheme: str, patience: Patience) -> Any:
    """The file system of a kind of store, without caches of listings and with no tries of its own."""
    connect = min(CONNECT_SECONDS, patience.request)
    if scheme == "s3":
        limits = {"connect_timeout": connect, "read_timeout": patience.request, "retries": {"max_attempts": 0}}
        system: Any = fsspec.filesystem(
            "s3", config_kwargs=limits, max_concurrency=1, use_listings_cache=False, skip_instance_cache=True
        )
        system.retries = 1
        return system
    if scheme in READ_ONLY:
        library = importlib.import_module("aiohttp")
        limit = library.ClientTimeout(total=None, sock_connect=connect, sock_read=patience.request)
        return fsspec.filesystem(
            scheme, client_kwargs={"timeout": limit}, use_listings_cache=False, skip_instance_cache=True
        )
    if scheme == "file":
        return fsspec.filesystem("file", auto_mkdir=True)
    return fsspec.filesystem(scheme, use_listings_cache=False, skip_instance_cache=scheme == "gs")


def _errors(scheme: str) -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """What a store's library raises: for what passes, and for what does not."""
    passing: list[type[BaseException]] = [OSError, FSTimeoutError, TimeoutError, asyncio.TimeoutError]
    refusing: list[type[BaseException]] = [FileNotFoundError, PermissionError]
    if scheme == "s3":
        library = importlib.import_module("botocore.exceptions")
        passing += [getattr(library, name) for name in _BOTO_PASSING]
        passing.append(importlib.import_module("aiohttp").ClientError)
        refusing += [library.NoCredentialsError, library.PartialCredentialsError, library.ParamValidationError]
    elif scheme in READ_ONLY:
        passing.append(importlib.import_module("aiohttp").ClientError)
    elif scheme == "gs":
        passing += [importlib.import_module("gcsfs.retry").HttpError, importlib.import_module("aiohttp").ClientError]
        refusing.append(importlib.import_module("google.auth.exceptions").DefaultCredentialsError)
    return tuple(passing), tuple(refusing)


def _refused(error: BaseException) -> bool:
    """Whether a server says that it knows who asks and will not answer."""
    if isinstance(error, OSError) and error.errno == errno.EINVAL:  # a name that no bucket or object can have
        return True
    status = getattr(error, "status", None) or getattr(error, "code", None)
    return str(status) in ("401", "403", "407")
