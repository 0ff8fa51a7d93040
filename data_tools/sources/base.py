"""What every source of raw images offers, and what several of them share."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.data.images import PIL_ERRORS
from trainer.data.shards import MEMBER_LIMIT, read_regular
from trainer.errors import UserError, one_line
from trainer.seeds import derive

SPLITS = ("train", "test")
SOURCE_KEY = "key data.source_path"
CLASSES_LIMIT = 10**6  # a label above is damage, not a data set
PIXEL_LIMIT = 1 << 26  # of one image: 8192 x 8192
RATIO_LIMIT, SMALL = 200, 1 << 26  # compressed arrays that expand further, beyond so many bytes, are bombs
FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders used: others may call outside programs
Pixels = NDArray[np.uint8]


class Source(Protocol):
    """Raw labelled images. A label is a position in `class_names`; an id is unique within a split, and stable."""

    @property
    def class_names(self) -> list[str]: ...

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        """(id, label) of the `train` or `test` images whose label is wanted."""
        ...

    def load(self, split: str, id: int) -> Pixels:
        """One image, uint8 (H,W,1) or (H,W,3), in its own size. Raises UserError, naming it, where it is broken."""
        ...


@dataclass(frozen=True)
class Place:
    """Where the bytes of one image lie: `size` bytes from `start` on, or the whole file where `size` is negative.

    In a parquet file `group` is the row group and `start` the row within it. `name` is what messages call the image.
    """

    file: str
    name: str
    start: int = 0
    size: int = -1
    group: int = -1


class PlacedSource(ABC):
    """A source of encoded images in files: they are read file by file, from front to back, by several processes."""

    @property
    @abstractmethod
    def class_names(self) -> list[str]: ...

    @abstractmethod
    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        """As of `Source`."""

    @abstractmethod
    def place(self, split: str, id: int) -> Place:
        """Of an id that `samples` gave."""

    def load(self, split: str, id: int) -> Pixels:
        """As of `Source`. Raises UserError."""
        place = self.place(split, id)
        return decode(io.BytesIO(read_place(place)), place.name)


class ArraySource:
    """A source whose images lie in memory: per split uint8 (N,H,W,C) and labels (N,)."""

    def __init__(
        self, class_names: list[str], images: dict[str, Pixels], labels: dict[str, NDArray[np.int64]], where: str
    ) -> None:
        """Raises UserError where images and labels do not fit together."""
        for split in SPLITS:
            if len(images[split]) != len(labels[split]):
                raise UserError(f"{where}: {len(images[split])} {split} images, {len(labels[split])} labels")
            if len(labels[split]) and not 0 <= labels[split].min() <= labels[split].max() < len(class_names):
                raise UserError(f"{where}: {split} labels lie outside 0..{len(class_names) - 1}")
        self._names, self._images, self._labels = class_names, images, labels

    @property
    def class_names(self) -> list[str]:
        return self._names

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        for id, label in enumerate(self._labels[split].tolist()):
            if label in wanted:
                yield id, label

    def load(self, split: str, id: int) -> Pixels:
        return self._images[split][id]


def holdout(labels: NDArray[np.int64], fraction: float) -> NDArray[np.bool_]:
    """A fixed stratified test split, True for test, shape (N,): for sources that ship none.

    Of each class the `round(n * fraction)` samples (at least one of several) with the smallest hash of their id; so a
    class's split does not depend on other classes.
    """
    rank = derive(0, "holdout", np.arange(len(labels), dtype=np.uint64)).view(np.uint64)
    test = np.zeros(len(labels), dtype=np.bool_)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        count = min(len(members) - 1, max(1, round(len(members) * fraction)))
        test[members[np.argsort(rank[members], kind="stable")[:count]]] = True
    return test


def split_arrays(
    images: Pixels, labels: NDArray[np.int64], fraction: float
) -> tuple[dict[str, Pixels], dict[str, NDArray[np.int64]]]:
    """One array of images cut by `holdout`."""
    test = holdout(labels, fraction)
    return {"train": images[~test], "test": images[test]}, {"train": labels[~test], "test": labels[test]}


def require_path(path: str, what: str) -> Path:
    """The raw data's path. Raises UserError where it is not given or not there."""
    if not path:
        raise UserError(f"data.source_path is empty: give the path of {what}")
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{found}: missing ({what}); {SOURCE_KEY}")
    if not (found.is_file() or found.is_dir()):
        raise UserError(f"{found}: neither file nor folder ({what}); {SOURCE_KEY}")
    return found


def read_place(place: Place, file: IO[bytes] | None = None) -> bytes:
    """An image's bytes, of a place in no row group; `file` is its file where that is open already.

    Raises:
        UserError: naming the image.
    """
    try:
        if place.size < 0:
            return read_regular(Path(place.file), MEMBER_LIMIT)
        with nullcontext(file) if file else Path(place.file).open("rb") as opened:
            opened.seek(place.start)
            data = opened.read(place.size)
    except OSError as error:
        raise UserError(f"{place.name}: {error.strerror or error}; {SOURCE_KEY}") from None
    if len(data) != place.size:
        raise UserError(f"{place.name}: the file ends before it; {SOURCE_KEY}")
    return data


def decode(file: io.BytesIO, where: str) -> Pixels:
    """An image file of any size as uint8 (H,W,1) where it is grey and (H,W,3) otherwise; transparency is dropped.

    The format is told by its bytes, not its name: ImageNet has a PNG named .JPEG. CMYK becomes RGB. The orientation
    in EXIF is not applied: torchvision, ADM and EDM do not either, so all see the same ImageNet. JPEGs are decoded at
    their full size, never at a reduced one (`draft`), which would give other pixels.

    Raises:
        UserError: a broken image, or one with more than 8 bits per channel or PIXEL_LIMIT pixels.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise UserError(f"{where}: {image.width}x{image.height} pixels are too many; {SOURCE_KEY}")
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise UserError(f"{where}: {image.mode} image with more than 8 bits per channel; {SOURCE_KEY}")
            grey = image.mode in ("1", "L", "LA")
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except UserError:
        raise
    except PIL_ERRORS as error:
        raise UserError(f"{where}: broken image ({one_line(error)}); {SOURCE_KEY}") from None
    return pixels[:, :, None] if grey else pixels


def check_size(where: str, claimed: int, stored: int) -> None:
    """Raises UserError where `stored` bytes of a file claim to hold more than such data can."""
    if claimed > max(SMALL, RATIO_LIMIT * stored):
        raise UserError(f"{where}: its header promises {claimed} bytes in a file of {stored}: damaged; {SOURCE_KEY}")


def missing_files(where: Path, names: Sequence[str]) -> UserError:
    return UserError(f"{where}: {', '.join(names)} missing; {SOURCE_KEY}")
