"""CIFAR-10 and CIFAR-100 from their binary archives (Krizhevsky 2009). The python archives are pickles: never read."""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import SOURCE_KEY, ArraySource, Pixels, missing_files, require_path
from trainer.data.shards import MEMBER_LIMIT, TAR_ERRORS, tar_members
from trainer.errors import UserError, one_line

PIXELS = 3 * 32 * 32
GZIP_MAGIC = b"\x1f\x8b"
FILES = {
    10: {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "test": ["test_batch.bin"]},
    100: {"train": ["train.bin"], "test": ["test.bin"]},
}
PICKLES = {10: ("cifar-10-batches-py", "data_batch_1"), 100: ("cifar-100-python", "train")}
FINE_LABELS = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""
NAMES: dict[int, list[str]] = {
    10: ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    100: [str(name) for name in FINE_LABELS.split()],
}


def open_cifar(path: str, classes: int) -> ArraySource:
    """`path` is the archive, a folder that holds it, or a folder of its .bin files. CIFAR-100: the fine labels.

    Raises:
        UserError: a file that is missing or damaged, or the python archive.
    """
    archive = f"cifar-{classes}-binary.tar.gz"
    found = require_path(path, archive)
    _refuse_pickles(found, classes, archive)
    names = [name for files in FILES[classes].values() for name in files]
    content = _from_archive(found, names) if found.is_file() else _from_folder(found, names, archive)
    images: dict[str, Pixels] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split, files in FILES[classes].items():
        parts = [_records(content[name], f"{found}: {name}", label_bytes=1 + (classes == 100)) for name in files]
        labels[split] = np.concatenate([part[0] for part in parts])
        images[split] = np.concatenate([part[1] for part in parts])
    return ArraySource(NAMES[classes], images, labels, where=str(found))


def _records(data: bytes, where: str, label_bytes: int) -> tuple[NDArray[np.int64], Pixels]:
    """Labels (N,) and images (N,32,32,3) of one file: per record the label bytes, the fine one last, then planes."""
    size = label_bytes + PIXELS
    if not data or len(data) % size:
        raise UserError(f"{where}: {len(data)} bytes, not a multiple of {size}: damaged; {SOURCE_KEY}")
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, size)
    planes = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return records[:, label_bytes - 1].astype(np.int64), np.ascontiguousarray(planes.transpose(0, 2, 3, 1))


def _from_archive(archive: Path, names: list[str]) -> dict[str, bytes]:
    content: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(_unpacked(archive)), mode="r:") as tar:
            for member in tar_members(tar):
                base = Path(member.name).name
                if member.isfile() and base in names:
                    file: Any = tar.extractfile(member)
                    content[base] = file.read()
    except (*TAR_ERRORS, zlib.error) as error:
        raise UserError(f"{archive}: damaged ({one_line(error)}); {SOURCE_KEY}") from None
    missing = [name for name in names if name not in content]
    if missing:
        raise missing_files(archive, missing)
    return content


def _unpacked(archive: Path) -> bytes:
    """The tar in an archive, compressed or not."""
    with archive.open("rb") as file:
        compressed = file.read(2) == GZIP_MAGIC
    with gzip.open(archive, "rb") if compressed else archive.open("rb") as file:
        data = file.read(MEMBER_LIMIT + 1)
    if len(data) > MEMBER_LIMIT:
        raise tarfile.ReadError(f"more than {MEMBER_LIMIT} bytes")
    return data


def _from_folder(folder: Path, names: list[str], archive: str) -> dict[str, bytes]:
    for candidate in (folder, *sorted(child for child in folder.iterdir() if child.is_dir())):
        if all((candidate / name).is_file() for name in names):
            return {name: (candidate / name).read_bytes() for name in names}
    if (folder / archive).is_file():
        return _from_archive(folder / archive, names)
    present = {path.name for path in folder.rglob("*.bin")}
    raise missing_files(folder, [archive, "or", *(name for name in names if name not in present)])


def _refuse_pickles(path: Path, classes: int, archive: str) -> None:
    folder, batch = PICKLES[classes]
    suspects = [path] if path.is_file() else [path / f"cifar-{classes}-python.tar.gz", path / folder, path / batch]
    if path.is_dir() and ((path / archive).is_file() or any(path.rglob("*.bin"))):
        return
    for suspect in suspects:
        if suspect.exists() and ("python" in suspect.name or suspect.name in (folder, batch)):
            raise UserError(f"{suspect}: a Python pickle, which is never read: take {archive}; {SOURCE_KEY}")
