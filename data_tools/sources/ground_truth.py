"""Which class each validation image of ImageNet is of: the images themselves are named by number alone."""

from __future__ import annotations

import gzip
import io
import re
import tarfile
import zlib
from pathlib import Path
from typing import Any

from data_tools.sources.base import SOURCE_KEY
from trainer.data.shards import TAR_ERRORS, read_regular, tar_members
from trainer.errors import UserError, one_line

KIT = "ILSVRC2012_devkit_t12"
TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
LISTS = ("val_labels.txt", "LOC_val_solution.csv", "val_annotations.txt")
WNID = re.compile(r"n\d{8}")
LIMIT = 1 << 26  # bytes of any of these files, unpacked
NAMES = (f"{KIT}.tar.gz", f"{KIT}/data/{TRUTH}", *LISTS)  # for messages
# What scipy raises for bytes that are no .mat file, besides errors of its own, which are plain exceptions by name.
MAT_ERRORS = (OSError, ValueError, TypeError, KeyError, IndexError, EOFError, MemoryError, NotImplementedError)


def read_truth(folders: list[Path]) -> dict[str, str] | None:
    """Class (wnid) by the image's name without its extension; None where no folder holds such a file.

    In this order: a list of lines `name wnid ...` (also Kaggle's LOC_val_solution.csv and Tiny-ImageNet's
    val_annotations.txt), the development kit unpacked, the development kit as it is downloaded.

    Raises:
        UserError: a file that is damaged.
    """
    for folder in folders:
        for name in LISTS:
            if (folder / name).is_file():
                return _from_list(folder / name)
    for folder in folders:
        for data in (folder / KIT / "data", folder / "data", folder):
            if (data / TRUTH).is_file() and (data / META).is_file():
                return _from_kit(_read(data / TRUTH), _read(data / META), str(data))
        if (folder / f"{KIT}.tar.gz").is_file():
            return _from_archive(folder / f"{KIT}.tar.gz")
    return None


def _from_list(path: Path) -> dict[str, str]:
    """Lines that do not name a wnid second (a heading) do not count."""
    words = [re.split(r"[\s,]+", line.strip()) for line in _text(_read(path), str(path)).splitlines()]
    found = {Path(line[0]).stem: line[1] for line in words if len(line) > 1 and WNID.fullmatch(line[1])}
    if not found:
        raise UserError(f"{path}: has no line `name wnid`; {SOURCE_KEY}")
    return found


def _from_archive(path: Path) -> dict[str, str]:
    found: dict[str, bytes] = {}
    try:
        with gzip.open(path) as packed:
            data = packed.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise tarfile.ReadError(f"more than {LIMIT} bytes")
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for member in tar_members(tar):
                name = Path(member.name).name
                file = tar.extractfile(member) if member.isfile() and name in (TRUTH, META) else None
                if file is not None:
                    found[name] = file.read()
    except (*TAR_ERRORS, zlib.error) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {SOURCE_KEY}") from None
    if len(found) < 2:
        raise UserError(f"{path}: holds not both {TRUTH} and {META}; {SOURCE_KEY}")
    return _from_kit(found[TRUTH], found[META], str(path))


def _from_kit(truth: bytes, meta: bytes, where: str) -> dict[str, str]:
    """Line n of the truth is the ILSVRC2012_ID of image n. These ids are in no order of wnids: meta.mat tells them."""
    wnids = _wnids(meta, f"{where}: {META}")
    lines = _text(truth, f"{where}: {TRUTH}").split()
    try:
        return {f"ILSVRC2012_val_{number:08d}": wnids[int(line)] for number, line in enumerate(lines, 1)}
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{where}: {TRUTH}: an id that {META} does not know ({one_line(error)}); {SOURCE_KEY}"
        ) from None


def _wnids(meta: bytes, where: str) -> dict[int, str]:
    from scipy.io import loadmat  # slow to import, and only this needs it
    from scipy.io.matlab import MatReadError

    try:
        synsets: Any = loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
        found = {int(id): str(wnid) for id, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)}
    except (*MAT_ERRORS, MatReadError, zlib.error) as error:
        raise UserError(f"{where}: not the synsets of ImageNet ({one_line(error)}); {SOURCE_KEY}") from None
    return found


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, LIMIT)
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror or error}); {SOURCE_KEY}") from None


def _text(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise UserError(f"{where}: not a text file; {SOURCE_KEY}") from None
