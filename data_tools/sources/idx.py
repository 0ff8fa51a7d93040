"""IDX files as MNIST and Fashion-MNIST ship them (LeCun et al. 1998), compressed or not."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import SOURCE_KEY, ArraySource, Pixels, check_size, missing_files, require_path
from trainer.errors import UserError

PREFIX = {"train": "train", "test": "t10k"}
FASHION = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
UNSIGNED_BYTE = 8


def open_idx(path: str, name: str) -> ArraySource:
    """The four files of one directory. Class names are those of Fashion-MNIST where `name` says so, else numbers.

    Raises:
        UserError: a file that is missing or is not what its name says.
    """
    folder = require_path(path, "the folder of train-images-idx3-ubyte.gz and its three companions")
    images: dict[str, Pixels] = {}
    labels: dict[str, NDArray[np.int64]] = {}
    for split, prefix in PREFIX.items():
        images[split] = read_idx(_find(folder, f"{prefix}-images", 3), 3)[..., None]
        labels[split] = read_idx(_find(folder, f"{prefix}-labels", 1), 1).astype(np.int64)
    highest = max((int(values.max()) for values in labels.values() if len(values)), default=-1)
    names = FASHION if "fashion" in name.lower() and highest < 10 else [str(label) for label in range(highest + 1)]
    return ArraySource(list(names), images, labels, where=str(folder))


def read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """One IDX file of unsigned bytes, with the number of dimensions expected.

    Raises:
        UserError: naming the file.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * dimensions)
            if header[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(header) != 4 + 4 * dimensions:
                raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimensions; {SOURCE_KEY}")
            shape = struct.unpack(f">{dimensions}I", header[4:])
            size = math.prod(shape)
            check_size(str(path), size, path.stat().st_size)
            data = file.read(size + 1)  # one more than promised: a longer file is damaged too
    except (OSError, EOFError, MemoryError, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); {SOURCE_KEY}") from None
    if len(data) != size:
        raise UserError(f"{path}: holds not the {size} bytes its header promises; {SOURCE_KEY}")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _find(folder: Path, stem: str, dimensions: int) -> Path:
    names = [f"{stem}{mark}idx{dimensions}-ubyte" for mark in ("-", ".")]
    for name in (candidate + suffix for candidate in names for suffix in ("", ".gz")):
        if (folder / name).is_file():
            return folder / name
    raise missing_files(folder, [f"{names[0]}.gz"])
