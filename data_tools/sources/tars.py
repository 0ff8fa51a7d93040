"""What lies where in a tar, by its headers alone: nothing is unpacked."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from data_tools.sources.base import SOURCE_KEY
from trainer.data.shards import MEMBER_LIMIT, TAR_ERRORS, tar_members
from trainer.errors import UserError, one_line

INNER_LIMIT = 1 << 33  # bytes of a tar within a tar


@contextmanager
def opened(path: Path, file: IO[bytes] | None = None) -> Iterator[tarfile.TarFile]:
    """An uncompressed tar to read. Raises UserError, naming it, for whatever is wrong with it while it is open."""
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; {SOURCE_KEY}")
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            yield tar
    except UserError:
        raise
    except TAR_ERRORS as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {SOURCE_KEY}") from None


def files_of(tar: tarfile.TarFile, where: str, limit: int = MEMBER_LIMIT) -> Iterator[tarfile.TarInfo]:
    """The regular files of an open tar. The others are passed over by their size: their bytes are not read.

    Raises:
        UserError: it is cut between two members, which reads without an error: the block of zeros is missing that
            follows the last one.
    """
    end = 0
    for member in tar_members(tar, limit):
        end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if member.isfile():
            yield member
    file = tar.fileobj
    assert file is not None
    file.seek(end)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise UserError(f"{where}: cut short (it has no end mark); {SOURCE_KEY}")
