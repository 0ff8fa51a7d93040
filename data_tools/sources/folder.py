"""A folder of class folders: train/<class>/*.JPEG and val/<class>/*.JPEG, or val/*.JPEG with a list of its labels."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from data_tools.sources.base import SOURCE_KEY, Place, PlacedSource, holdout, require_path
from data_tools.sources.ground_truth import NAMES, read_truth
from trainer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
TEST_FOLDERS = ("val", "test")
TEST_FRACTION = 0.1


class FolderSource(PlacedSource):
    """Files sorted within their class. A val/ that holds images, not class folders, is sorted by the labels that lie in
    it or beside it (`read_truth`): so ImageNet's validation images and those of Tiny-ImageNet are shipped. Without
    train/ and val/ (or test/) every class folder lies directly in `path` and a fixed stratified tenth of each class is
    the test split."""

    def __init__(self, path: str, class_list: list[str] | None) -> None:
        """Raises UserError where folders are missing; no image is opened yet."""
        self._root = require_path(path, "a folder of class folders")
        if not self._root.is_dir():
            raise UserError(f"{self._root}: not a folder of class folders; {SOURCE_KEY}")
        self._folders = {"train": self._root, "test": self._root}
        self.shipped_split = (self._root / "train").is_dir()
        if self.shipped_split:
            self._folders = {"train": self._root / "train", "test": _test_folder(self._root)}
        self._names = class_list if class_list is not None else _class_folders(self._folders["train"])
        self._flat = self._flat_test() if self.shipped_split else None
        self._files: dict[str, dict[int, Path]] = {"train": {}, "test": {}}
        self._counts: dict[tuple[str, str], int] = {}  # of classes listed before: listing ImageNet takes a while

    @property
    def class_names(self) -> list[str]:
        return self._names

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        """Ids count the files class by class over all classes before, so they stay when a class is added at the end."""
        next_id = 0
        for label, name in enumerate(self._names):
            if label > max(wanted, default=-1):
                return
            if label in wanted or (split, name) not in self._counts:
                files = self._class_files(split, name)
                self._counts[split, name] = len(files)
                for id, file in enumerate(files if label in wanted else [], next_id):
                    self._files[split][id] = file
                    yield id, label
            next_id += self._counts[split, name]

    def place(self, split: str, id: int) -> Place:
        file = str(self._files[split][id])
        return Place(file, file)

    def _flat_test(self) -> dict[str, list[Path]] | None:
        """Test images by class, where they lie in no class folders."""
        folder = self._folders["test"]
        if any((folder / name).is_dir() for name in self._names):
            return None
        truth = read_truth([folder, self._root])
        if truth is None:
            if _has_folders(folder):
                return None
            raise UserError(
                f"{folder}: holds images, not class folders: sort them into one per class, or add their labels: one "
                f"of {', '.join(NAMES)}; {SOURCE_KEY}"
            )
        files: dict[str, list[Path]] = {}
        for file in _images(folder):
            if file.stem not in truth:
                raise UserError(f"{file}: has no label; {SOURCE_KEY}")
            files.setdefault(truth[file.stem], []).append(file)
        return files

    def _class_files(self, split: str, name: str) -> list[Path]:
        if split == "test" and self._flat is not None:
            return self._flat.get(name, [])
        folder = self._folders[split] / name
        if not folder.is_dir():
            raise UserError(f"{folder}: missing (class {name!r}); {SOURCE_KEY}")
        files = _images(folder)
        if self.shipped_split:
            return files
        test = holdout(np.zeros(len(files), dtype=np.int64), TEST_FRACTION) if files else []
        return [file for file, held in zip(files, test, strict=True) if held == (split == "test")]


def _test_folder(root: Path) -> Path:
    for name in TEST_FOLDERS:
        folder = root / name
        if folder.is_dir():
            return folder
    raise UserError(
        f"{root}: train/ is there, but neither {' nor '.join(f'{name}/' for name in TEST_FOLDERS)}; {SOURCE_KEY}"
    )


def _class_folders(folder: Path) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: holds no class folders; {SOURCE_KEY}")
    return names


def _has_folders(folder: Path) -> bool:
    return any(entry.is_dir() for entry in folder.iterdir())


def _images(folder: Path) -> list[Path]:
    """Image files below a folder (Tiny-ImageNet keeps them one level deeper), sorted by path."""
    return sorted(
        Path(directory) / name
        for directory, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )
