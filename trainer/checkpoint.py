"""A checkpoint on disk: full fp32 tensors as safetensors and one state.json, whatever the ranks and the ZeRO stage.

    <directory>/weights.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  [ema.safetensors]  state.json

Written beside its place under a temporary name, synced to the disk and renamed, so a directory of the final name is
whole. state.json keeps size and crc32 of each file, and a crc32 of what it says itself: what has changed on the disk
since is found. Nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.shards import fsync_directory
from trainer.errors import UserError

FORMAT = 2
STATE = "state.json"
SUFFIX = ".safetensors"
CHUNK_BYTES = 1 << 22

Pieces = dict[str, dict[str, Tensor]]  # tensors by name, by the file that keeps them


class DamagedCheckpoint(UserError):
    """A checkpoint that is no longer what was written; another one may be sound."""


class CheckpointWriter:
    """Writes checkpoints in a thread of its own, one at a time.

    A failure (no disk) is kept and raised by the next `published` or `finish`; nothing is published then.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._published: list[Path] = []
        self._failure: UserError | None = None

    def submit(self, directory: Path, pieces: Pieces, state: Mapping[str, Any]) -> None:
        """Begin to write a checkpoint once the one before is written.

        Args:
            pieces: contiguous tensors on the CPU; given away, and taken out of the dict to be freed once written.
            state: what JSON can keep, serialised before this returns.
        """
        self.wait()
        self._writing = self._thread.submit(write_checkpoint, directory, pieces, _as_json(state))

    def wait(self) -> None:
        """Until nothing is being written."""
        if self._writing is not None:
            wait([self._writing])
            self._note()

    def published(self) -> list[Path]:
        """Directories published since the last call. Raises UserError, once, when one could not be written."""
        if self._writing is not None and self._writing.done():
            self._note()
        self._complain()
        published, self._published = self._published, []
        return published

    def finish(self) -> None:
        """Wait for what is being written. Raises as `published` does."""
        self.wait()
        self._complain()

    def close(self) -> None:
        """Finish what is being written and end the thread."""
        self._thread.shutdown(wait=True)

    def _note(self) -> None:
        assert self._writing is not None
        written, self._writing = self._writing, None
        try:
            self._published.append(written.result())
        except UserError as error:
            self._failure = error

    def _complain(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


def write_checkpoint(directory: Path, pieces: Pieces, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint and give it its name, in place of an older one of that name; gives back the directory.

    Args: pieces: as `CheckpointWriter.submit` takes them.

    Raises:
        UserError: it could not be written; nothing is left of it.
    """
    staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        files = {name: _write_piece(staging / f"{name}{SUFFIX}", pieces.pop(name)) for name in list(pieces)}
        content: dict[str, Any] = {"format": FORMAT, "files": files, **state}
        (staging / STATE).write_text(json.dumps(content | {"check": _check(content)}, indent=1))
        _publish(staging, directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise UserError(f"{directory}: the checkpoint could not be written ({error})") from None
    return directory


class CheckpointReader:
    """Reads a checkpoint tensor by tensor.

    Raises:
        DamagedCheckpoint: one line naming the file that is missing or no longer what was written.
        UserError: one line naming the file that cannot be read, or is of another format or model.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the state alone; `verify` reads everything."""
        self._directory = directory
        self.state = _read_state(directory / STATE)
        self._files: dict[str, dict[str, int]] = self.state["files"]

    def verify(self) -> None:
        """Compare size and crc32 of each file with what was written."""
        for name, written in self._files.items():
            path = self._path(name)
            try:
                found = _fingerprint(path)
            except OSError as error:
                raise _unreadable(path, error) from None
            if found != written:
                raise DamagedCheckpoint(
                    f"{path}: damaged checkpoint ({found['bytes']} bytes with crc32 {found['crc32']:08x}, written were "
                    f"{written['bytes']} with {written['crc32']:08x})"
                )

    def check(self, name: str, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse a missing or damaged `<name>.safetensors`, and one with other tensors than these."""
        path = self._path(name)
        if name not in self._files:
            raise UserError(f"{path}: not in this checkpoint")
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None
        expected = {key: tuple(shape) for key, shape in shapes.items()}
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                raise UserError(f"{path}: {key} is {found.get(key)} there and {expected.get(key)} in the model")

    def read(self, name: str, use: Callable[[Callable[[str], Tensor]], None]) -> None:
        """Call `use` with a function that reads one tensor of a checked file by its name, on the CPU."""
        with safe_open(self._path(name), framework="pt") as file:
            use(file.get_tensor)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}{SUFFIX}"


def _write_piece(path: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Write one file to the disk; its fingerprint."""
    save_file(tensors, path)
    tensors.clear()
    fsync_directory(path)
    return _fingerprint(path)


def _publish(staging: Path, directory: Path) -> None:
    for path in (staging / STATE, staging):
        fsync_directory(path)
    old = staging.with_suffix(".old")
    if directory.exists():
        directory.rename(old)
    staging.rename(directory)
    fsync_directory(directory.parent)
    shutil.rmtree(old, ignore_errors=True)


def _fingerprint(path: Path) -> dict[str, int]:
    """Size and crc32 of a file. Raises OSError."""
    size = crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
    return {"bytes": size, "crc32": crc}


def _as_json(value: Any) -> Any:
    """The value as JSON gives it back: a copy that shares nothing with the original."""
    return json.loads(json.dumps(value))


def _check(content: Mapping[str, Any]) -> int:
    """crc32 of a state, whatever its layout in the file."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from None
    if not isinstance(state, dict):
        raise DamagedCheckpoint(f"{path}: damaged checkpoint (not a JSON object)")
    check = state.pop("check", None)
    if state.get("format") != FORMAT and check in (None, _check(state)):
        raise UserError(f"{path}: not a checkpoint of format {FORMAT}")
    if check != _check(state) or not _lists_files(state.get("files")):
        raise DamagedCheckpoint(f"{path}: damaged checkpoint (its content is not what was written)")
    return state


def _lists_files(files: Any) -> bool:
    """Whether this is {name: {"bytes", "crc32"}}, no name leading out of the directory."""
    return isinstance(files, dict) and all(
        name.isidentifier()
        and isinstance(entry, dict)
        and entry.keys() == {"bytes", "crc32"}
        and all(isinstance(value, int) for value in entry.values())
        for name, entry in files.items()
    )


def _unreadable(path: Path, error: Exception) -> UserError:
    """Damage, unless it is a passing trouble of the system, or a lack of permission."""
    gone = isinstance(error, FileNotFoundError | IsADirectoryError) or getattr(error, "errno", None) == errno.EIO
    kind = UserError if isinstance(error, OSError) and not gone else DamagedCheckpoint
    return kind(f"{path}: unreadable checkpoint ({error})")
