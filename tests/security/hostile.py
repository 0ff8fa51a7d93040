"""Things that an attacker would put where data belongs, and the watch over what reading them may take."""

from __future__ import annotations

import io
import os
import pickle
import resource
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TEN_GB = 10 * 2**30
ROOM = 1 << 30  # bytes of address space that reading something small may take
SECONDS = 10.0  # of CPU time


class Trap:
    """Unpickling one makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """Fails the test where anything was unpickled."""
    trap = Trap(tmp_path / "unpickled")
    yield trap
    assert not trap.path.exists()


def pickled(trap: Trap) -> bytes:
    return pickle.dumps(trap)


def pickled_npy(trap: Trap) -> bytes:
    """A .npy file of dtype object: its data are a pickle."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([trap], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def huge_npy(descr: str, shape: tuple[int, ...]) -> bytes:
    """A .npy header that claims 10 GB, and no data."""
    buffer = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": (TEN_GB // 64, *shape)}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *extra: tuple[bytes, bytes], packed: bytes | None = None) -> bytes:
    """A grey PNG with any chunks before its compressed pixels, which are zeros unless given."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(height * (width + 1))) if packed is None else packed
    chunks = [(b"IHDR", header), *extra, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def zeros(megabytes: int) -> bytes:
    """So many megabytes, compressed to a thousandth."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join([*(packer.compress(block) for _ in range(megabytes)), packer.flush()])


def text_bomb(size: int, megabytes: int) -> bytes:
    """A small PNG whose compressed comment is not."""
    return png(size, size, (b"zTXt", b"Comment\x00\x00" + zeros(megabytes)))


def pixel_bomb(width: int, height: int) -> bytes:
    """A few bytes that say they are a large image."""
    return png(width, height, packed=b"")


def huge_webp() -> bytes:
    """A header of 16384 x 16384 pixels, with alpha and animation, and one frame of nothing."""
    size = (16383).to_bytes(3, "little")
    frames = b"ANIM" + struct.pack("<I", 6) + bytes(6)
    content = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x12\0\0\0" + size + size + frames
    return b"RIFF" + struct.pack("<I", len(content)) + content


def tar_header(name: str, size: int, type: bytes = tarfile.REGTYPE, link: str = "") -> bytes:
    """One header, right in itself, of a member that need not follow. `size` may be negative (base 256)."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = size, type, link
    return member.tobuf(tarfile.GNU_FORMAT)


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """An honest tar, whatever the names."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def sparse(path: Path, size: int = TEN_GB) -> Path:
    """A file of that size that takes no room on the disk."""
    path.touch()
    os.truncate(path, size)
    return path


@contextmanager
def little_memory(room: int = ROOM) -> Iterator[None]:
    """Within it this process gets at most `room` bytes more of address space, and SECONDS of CPU time."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    began = time.process_time()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - began < SECONDS


def refused(read: Callable[[], object], error: type[Exception], names: str) -> str:
    """The one line in which `read` refuses, naming the file, quickly and without much memory."""
    with little_memory(), pytest.raises(error) as caught:
        read()
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and names in text and len(text) < 2000
    return text


def no_file(path: Path, kind: str) -> Path:
    """A pipe that nobody writes to, an endless device, or a directory, where a file should be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    return path


NO_FILES = pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
QUICK = pytest.mark.timeout(60)  # a pipe that is waited for would wait for ever
