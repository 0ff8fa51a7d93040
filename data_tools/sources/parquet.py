"""Parquet files as Hugging Face's data sets have them: a column of images {bytes, path} and one of labels.

Needs pyarrow: pip install 'palimpsest[parquet]'.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import (
    CLASSES_LIMIT,
    SOURCE_KEY,
    Pixels,
    Place,
    PlacedSource,
    decode,
    holdout,
    require_path,
)
from data_tools.sources.ground_truth import WNID
from trainer.data.shards import read_regular
from trainer.errors import UserError, one_line

if TYPE_CHECKING:
    import pyarrow.parquet as pq

NAMES_FILE = "labels.txt"
TEST_NAMES = ("validation", "val", "test")
TEST_FRACTION = 0.1
NAMES_LIMIT = 1 << 26  # bytes of that file
ROWS = 64  # decoded at a time: what a process holds of a row group, which may be as large as its file
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class _Columns:
    image: str
    label: str
    names: list[str]  # of the labels, where the file knows them


@dataclass(frozen=True)
class _Split:
    """All rows of a split: file number, row group, row within it, label; each (N,)."""

    files: list[Path]
    file: Ints
    group: Ints
    row: Ints
    label: Ints


class ParquetSource(PlacedSource):
    """`path` holds train*.parquet and validation*.parquet (or val*, test*), also one level down (data/, train/); files
    of other names are one set, of which a fixed stratified tenth of each class is the test split.

    Class names are the lines of labels.txt in `path`, else those of the files' ClassLabel. Where a class list has wnids
    and neither has, the wnids are taken from the images' paths, which end in them (..._n01440764.JPEG).
    """

    def __init__(self, path: str, class_list: list[str] | None) -> None:
        """Reads the columns of labels, no images. Raises UserError, naming the file."""
        root = require_path(path, "a folder of parquet files")
        files = _files(root)
        self._columns = _columns(files["train"][0])
        splits = {split: _read_split(paths, self._columns.label) for split, paths in files.items()}
        if "test" not in splits:
            test = holdout(splits["train"].label, TEST_FRACTION)
            splits = {"train": _rows(splits["train"], ~test), "test": _rows(splits["train"], test)}
        self._splits = splits
        self._own = _names(root, self._columns, splits)
        if class_list and not set(class_list) <= set(self._own) and all(map(WNID.fullmatch, class_list)):
            self._own = _wnids(splits["train"], self._columns.image, len(self._own))
        twice = {name for name in self._own if self._own.count(name) > 1}
        if twice:  # as of Hugging Face's imagenet-1k: the bird and the machine are both "crane"
            raise UserError(
                f"{root}: two classes are called {min(twice)!r}: name them all in {NAMES_FILE}; {SOURCE_KEY}"
            )
        order = {name: number for number, name in enumerate(class_list or self._own)}
        last = len(order)  # classes that are not listed come last
        self._order = {split: _by_class(part, self._own, order, last) for split, part in splits.items()}

    @property
    def class_names(self) -> list[str]:
        return self._own

    def samples(self, split: str, wanted: Collection[int]) -> Iterator[tuple[int, int]]:
        """Ids count the rows class by class, in the order of the class list, so they stay when it grows."""
        labels = self._splits[split].label[self._order[split]]
        for id in np.flatnonzero(np.isin(labels, list(wanted))).tolist():
            yield id, int(labels[id])

    def place(self, split: str, id: int) -> Place:
        part, index = self._splits[split], self._order[split][id]
        file, group, row = part.files[part.file[index]], int(part.group[index]), int(part.row[index])
        return Place(str(file), f"{file}: row {row} of row group {group}", start=row, group=group)

    def load(self, split: str, id: int) -> Pixels:
        ((place, data),) = read_rows([self.place(split, id)])
        return decode(io.BytesIO(data), place.name)


def read_rows(places: Sequence[Place]) -> Iterator[tuple[Place, bytes]]:
    """The images of places in one file, in the file's order; each row group is read once, a batch of rows at a time.

    An image without bytes, one that lies elsewhere, is given as empty: it is broken.

    Raises:
        UserError: the file is damaged.
    """
    name = places[0].file
    with _opened(Path(name)) as file:
        image = _columns(Path(name), file).image
        for group in dict.fromkeys(place.group for place in places):
            wanted = {place.start: place for place in places if place.group == group}
            first = 0
            batches = file.iter_batches(ROWS, row_groups=[group], columns=[f"{image}.bytes"], use_threads=False)
            for batch in _guarded(batches, name):
                cells = batch.column(0).field("bytes")
                for row in range(first, first + batch.num_rows):
                    if row in wanted:
                        yield wanted[row], cells[row - first].as_py() or b""
                first += batch.num_rows


def _files(root: Path) -> dict[str, list[Path]]:
    """Files by split; those of one set are all "train"."""
    if root.is_file():
        return {"train": [root]}
    for folder in (root, root / "data"):
        found = {
            split: next((paths for name in names if (paths := _matching(folder, name))), [])
            for split, names in (("train", ("train",)), ("test", TEST_NAMES))
        }
        if all(found.values()):
            return found
    every = sorted(root.glob("*.parquet")) or sorted((root / "data").glob("*.parquet"))
    if not every:
        raise UserError(f"{root}: holds no parquet files, nor do data/, train/ with validation/; {SOURCE_KEY}")
    return {"train": every}


def _matching(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}*.parquet")) or sorted((folder / name).glob("*.parquet"))


def _opened(path: Path) -> pq.ParquetFile:
    """Raises UserError where the file, or pyarrow, is not there."""
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install 'palimpsest[parquet]'") from None
    if not path.is_file():
        raise UserError(f"{path}: not a regular file; {SOURCE_KEY}")
    with _named(path):
        return pq.ParquetFile(path)


@contextmanager
def _named(path: Path | str) -> Generator[None, None, None]:
    """Turns what pyarrow raises for a damaged file into one line."""
    import pyarrow as pa

    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError, MemoryError) as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {SOURCE_KEY}") from None


def _guarded(batches: Iterator[Any], name: str) -> Iterator[Any]:
    while True:
        with _named(name):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _columns(path: Path, opened: Any = None) -> _Columns:
    """Which columns hold image and label: what Hugging Face's features say, else those of these names."""
    file = opened or _opened(path)
    schema = file.schema_arrow
    features = _features(schema.metadata or {})
    images = [key for key, value in features.items() if value.get("_type") == "Image"] or ["image"]
    labels = [key for key, value in features.items() if value.get("_type") == "ClassLabel"] or ["label"]
    names = [str(name) for name in features.get(labels[0], {}).get("names") or []]
    columns = _Columns(images[0], labels[0], names)
    leaves = _leaves(file)
    missing = [leaf for leaf in (f"{columns.image}.bytes", columns.label) if leaf not in leaves]
    if missing:
        raise UserError(
            f"{path}: column {missing[0]} missing: images with their bytes and labels are read; {SOURCE_KEY}"
        )
    return columns


def _leaves(file: Any) -> set[str]:
    """Paths of the columns that hold values."""
    return {file.schema.column(number).path for number in range(len(file.schema))}


def _features(metadata: dict[bytes, bytes]) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(metadata[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError, RecursionError):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}


def _read_split(paths: list[Path], label: str) -> _Split:
    parts: list[tuple[Ints, Ints, Ints, Ints]] = []
    for number, path in enumerate(paths):
        file = _opened(path)
        with _named(path):
            labels = file.read(columns=[label], use_threads=False).column(0).to_numpy()
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        sound = np.issubdtype(labels.dtype, np.integer)
        if not sound or (len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES_LIMIT):
            raise UserError(f"{path}: column {label} holds other things than labels; {SOURCE_KEY}")
        group = np.repeat(np.arange(len(sizes)), sizes)
        row = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.zeros(0, np.int64)
        parts.append((np.full(len(labels), number), group, row, labels.astype(np.int64)))
    file, group, row, label_N = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _Split(paths, file, group, row, label_N)


def _rows(split: _Split, mask: NDArray[np.bool_]) -> _Split:
    return _Split(split.files, split.file[mask], split.group[mask], split.row[mask], split.label[mask])


def _names(root: Path, columns: _Columns, splits: dict[str, _Split]) -> list[str]:
    highest = max((int(split.label.max()) for split in splits.values() if len(split.label)), default=-1)
    listed = (root if root.is_dir() else root.parent) / NAMES_FILE
    names, where = columns.names, f"{root}: ClassLabel"
    if listed.is_file():
        names, where = _lines(listed), str(listed)
    if names and highest >= len(names):
        raise UserError(f"{where}: {len(names)} names, but there is a label {highest}; {SOURCE_KEY}")
    return names or [str(label) for label in range(highest + 1)]


def _lines(path: Path) -> list[str]:
    try:
        text = read_regular(path, NAMES_LIMIT).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)}); {SOURCE_KEY}") from None
    return [line.strip() for line in text.rstrip().splitlines()]


def _wnids(split: _Split, image: str, classes: int) -> list[str]:
    """The wnid of each label, by the paths of the training images; a label without any keeps its number."""
    found: dict[int, str] = {}
    for number, path in enumerate(split.files):
        file = _opened(path)
        if f"{image}.path" not in _leaves(file):
            break
        with _named(path):
            column = file.read(columns=[f"{image}.path"], use_threads=False).column(0)
            names = [name for chunk in column.chunks for name in chunk.field("path").to_pylist()]
            sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        mask = split.file == number
        rows = np.cumsum([0, *sizes])[split.group[mask]] + split.row[mask]
        for row, label in zip(rows.tolist(), split.label[mask].tolist(), strict=True):
            wnids = WNID.findall(Path(str(names[row] or "")).stem)
            if wnids and found.setdefault(label, wnids[-1]) != wnids[-1]:
                raise UserError(f"{path}: label {label} has images of {found[label]} and {wnids[-1]}; {SOURCE_KEY}")
    return [found.get(label, str(label)) for label in range(classes)]


def _by_class(split: _Split, names: list[str], order: dict[str, int], last: int) -> Ints:
    """Indices of the rows, sorted by the class's position in the list, then by file and row."""
    position = np.array([order.get(name, last + label) for label, name in enumerate(names)], dtype=np.int64)
    return np.argsort(position[split.label], kind="stable")
