"""ImageNet (ILSVRC2012) as its tars: ILSVRC2012_img_train.tar, which holds one tar of each class, and
ILSVRC2012_img_val.tar, whose images are named by number. Neither is unpacked."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterator
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from tarfile import TarInfo

from data_tools.sources.base import SOURCE_KEY, Place, PlacedSource, missing_files, require_path
from data_tools.sources.folder import EXTENSIONS
from data_tools.sources.ground_truth import NAMES, read_truth
from data_tools.sources.tars import INNER_LIMIT, files_of, opened
from trainer.errors import UserError, one_line

TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
Found = list[list[tuple[str, int, int]]]  # of each class: (name, first byte in the outer tar, size), sorted


class ImageNetSource(PlacedSource):
    """Class names are wnids. Only headers are read before images are: those of the tar of tars, and those within the
    tars of the classes named by the class list, or of all. Ids count the images as in `FolderSource`, so that the
    unpacked tars give the same ids."""

    def __init__(self, path: str, class_list: list[str] | None) -> None:
        """Raises UserError where a tar is missing; they are read when they are needed."""
        self._root = require_path(path, f"the folder of {TRAIN} and {VAL}")
        missing = [name for name in (TRAIN, VAL) if not (self._root / name).is_file()]
        if missing:
            raise missing_files(self._root, missing)
        self._names = class_list if class_list is not None else sorted(self._tars)

    @property
    def class_names(self) -> list[str]:
        return self._names

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        first = 0
        for label, images in enumerate(self._found(split)):
            if label in wanted:
                yield from ((id, label) for id in range(first, first + len(images)))
            first += len(images)

    def place(self, split: str, id: int) -> Place:
        ends = self._ends[split]
        label = bisect_right(ends, id)
        images = self._found(split)[label]
        name, start, size = images[id - ends[label] + len(images)]
        path, inner = (TRAIN, f"{self._names[label]}.tar/") if split == "train" else (VAL, "")
        tar = self._root / path
        return Place(str(tar), f"{tar}: {inner}{one_line(name)}", start, size)

    def _found(self, split: str) -> Found:
        return self._train if split == "train" else self._val

    @cached_property
    def _ends(self) -> dict[str, list[int]]:
        """Of each class, the id after its last one."""
        return {split: list(accumulate(map(len, self._found(split)))) for split in ("train", "test")}

    @cached_property
    def _tars(self) -> dict[str, TarInfo]:
        """The tars of the classes in the tar of tars, by wnid."""
        with opened(self._root / TRAIN) as tar:
            members = list(files_of(tar, str(self._root / TRAIN), INNER_LIMIT))
        found = {Path(member.name).stem: member for member in members if member.name.endswith(".tar")}
        if not found:
            raise UserError(f"{self._root / TRAIN}: holds no tars; {SOURCE_KEY}")
        return found

    @cached_property
    def _train(self) -> Found:
        missing = [name for name in self._names if name not in self._tars]
        if missing:
            raise UserError(f"{self._root / TRAIN}: {missing[0]}.tar missing (class {missing[0]!r}); {SOURCE_KEY}")
        found: dict[str, list[tuple[str, int, int]]] = {}
        with opened(self._root / TRAIN) as outer:
            for name in sorted(self._names, key=lambda name: self._tars[name].offset):  # from front to back
                member = self._tars[name]
                file = outer.extractfile(member)
                assert file is not None
                with opened(self._root / TRAIN, file) as inner:
                    images = [image for image in files_of(inner, f"{outer.name}: {name}.tar") if _is_image(image.name)]
                found[name] = sorted(
                    (image.name, member.offset_data + image.offset_data, image.size) for image in images
                )
        return [found[name] for name in self._names]

    @cached_property
    def _val(self) -> Found:
        where = self._root / VAL
        truth = read_truth([self._root])
        if truth is None:
            raise UserError(f"{self._root}: labels of {VAL} missing: one of {', '.join(NAMES)}; {SOURCE_KEY}")
        labels = {name: label for label, name in enumerate(self._names)}
        found: Found = [[] for _ in self._names]
        with opened(where) as tar:
            for image in files_of(tar, str(where)):
                if not _is_image(image.name):
                    continue
                wnid = truth.get(Path(image.name).stem)
                if wnid is None:
                    raise UserError(f"{where}: {one_line(image.name)} has no label; {SOURCE_KEY}")
                if wnid in labels:
                    found[labels[wnid]].append((Path(image.name).name, image.offset_data, image.size))
        return [sorted(images) for images in found]


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not Path(name).name.startswith(".")
