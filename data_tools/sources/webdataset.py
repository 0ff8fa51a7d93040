"""Existing WebDataset tars with an image and a `cls` member per sample, read by tarfile: nothing in them is run."""

from __future__ import annotations

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import CLASSES_LIMIT, SOURCE_KEY, Place, PlacedSource, holdout, require_path
from data_tools.sources.tars import files_of, opened
from trainer.data.images import PIL_FORMATS
from trainer.data.shards import LABEL_EXTENSION
from trainer.errors import UserError, one_line

TEST_NAMES = ("val", "test")
TEST_FRACTION = 0.1


@dataclass(frozen=True)
class _Record:
    tar: Path
    key: str
    label: int
    offset: int
    size: int


class WebDatasetSource(PlacedSource):
    """`path` holds train/*.tar and val/*.tar (or test/), or tars named train*, val*, test*; tars of other names are
    one set, of which a fixed stratified tenth of each class is the test split."""

    def __init__(self, path: str) -> None:
        """Raises UserError, naming the file, for a tar that is cut short or a sample without image or label."""
        root = require_path(path, "a folder of WebDataset tars")
        files = _tars(root)
        if "all" in files:
            records = _read_all(files["all"])
            test = holdout(np.array([record.label for record in records], dtype=np.int64), TEST_FRACTION)
            self._records = {"train": _where(records, ~test), "test": _where(records, test)}
        else:
            self._records = {split: _read_all(tars) for split, tars in files.items()}
        highest = max((record.label for part in self._records.values() for record in part), default=-1)
        self._names = [str(label) for label in range(highest + 1)]

    @property
    def class_names(self) -> list[str]:
        return self._names

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        for id, record in enumerate(self._records[split]):
            if record.label in wanted:
                yield id, record.label

    def place(self, split: str, id: int) -> Place:
        record = self._records[split][id]
        name = f"{record.tar}: sample {one_line(record.key)}"
        return Place(str(record.tar), name, record.offset, record.size)


def _tars(root: Path) -> dict[str, list[Path]]:
    """Tars by split, or all under "all"."""
    if root.is_file():
        return {"all": [root]}
    for test in TEST_NAMES:
        for train_glob, test_glob in (("train/*.tar", f"{test}/*.tar"), ("train*.tar", f"{test}*.tar")):
            found = {"train": sorted(root.glob(train_glob)), "test": sorted(root.glob(test_glob))}
            if all(found.values()):
                return found
    tars = sorted(root.glob("*.tar"))
    if not tars:
        raise UserError(f"{root}: holds no tars, nor train/ with val/ or test/; {SOURCE_KEY}")
    return {"all": tars}


def _where(records: list[_Record], mask: NDArray[np.bool_]) -> list[_Record]:
    return [record for record, chosen in zip(records, mask, strict=True) if chosen]


def _read_all(tars: list[Path]) -> list[_Record]:
    return [record for tar in tars for record in _read_tar(tar)]


def _read_tar(path: Path) -> list[_Record]:
    """Samples of one tar in their order; a key is the name up to the first dot of its last part, as in webdataset."""
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int] = {}
    with opened(path) as tar:
        for member in files_of(tar, str(path)):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}" if folder else stem
            if extension.lower() in PIL_FORMATS:
                images[key] = (member.offset_data, member.size)
            elif extension.lower() == LABEL_EXTENSION:
                labels[key] = _label(tar, member, f"{path}: sample {one_line(key)}")
    odd = sorted(images.keys() ^ labels.keys())
    if odd:
        raise UserError(
            f"{path}: sample {one_line(odd[0])} has not both an image (png, jpg, webp) and a cls; {SOURCE_KEY}"
        )
    return [_Record(path, key, labels[key], *span) for key, span in images.items()]


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> int:
    file = tar.extractfile(member)
    text = file.read(32).decode("ascii", "replace").strip() if file else ""
    if not text.isdecimal() or int(text) >= CLASSES_LIMIT:
        raise UserError(f"{where}: label {text!r} is not a whole number below {CLASSES_LIMIT}; {SOURCE_KEY}")
    return int(text)
