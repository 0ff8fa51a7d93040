"""Arrays in an .npz file: x_train, y_train, x_test, y_test; or images, labels, split by a fixed stratified tenth."""

from __future__ import annotations

import lzma
import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import (
    CLASSES_LIMIT,
    SOURCE_KEY,
    ArraySource,
    Pixels,
    check_size,
    require_path,
    split_arrays,
)
from trainer.errors import UserError, one_line

TEST_FRACTION = 0.1
NPZ_ERRORS = (
    *(OSError, ValueError, EOFError, KeyError, TypeError, RuntimeError, NotImplementedError, MemoryError),
    *(SyntaxError, RecursionError, struct.error, zlib.error, lzma.LZMAError, zipfile.BadZipFile),
)
SPLIT_KEYS = {"x_train", "y_train", "x_test", "y_test"}
SINGLE_KEYS = {"images", "labels"}


def open_npz(path: str) -> ArraySource:
    """Images uint8, (N,H,W), (N,H,W,C) or (N,C,H,W) with C 1 or 3; labels whole numbers; `classes` may name them.

    Raises:
        UserError: a file that is missing, damaged or pickled, or arrays of other shapes or types.
    """
    file = require_path(path, "an .npz file")
    arrays = _read(file)
    if arrays.keys() >= SPLIT_KEYS:
        images = {"train": _images(file, arrays, "x_train"), "test": _images(file, arrays, "x_test")}
        labels = {"train": _labels(file, arrays, "y_train"), "test": _labels(file, arrays, "y_test")}
    elif arrays.keys() >= SINGLE_KEYS:
        pixels, numbers = _images(file, arrays, "images"), _labels(file, arrays, "labels")
        if len(pixels) != len(numbers):
            raise UserError(f"{file}: {len(pixels)} images, {len(numbers)} labels; {SOURCE_KEY}")
        images, labels = split_arrays(pixels, numbers, TEST_FRACTION)
    else:
        raise UserError(f"{file}: holds neither {sorted(SPLIT_KEYS)} nor {sorted(SINGLE_KEYS)}; {SOURCE_KEY}")
    highest = max((int(values.max()) for values in labels.values() if len(values)), default=-1)
    if highest >= CLASSES_LIMIT:
        raise UserError(f"{file}: label {highest} is not below {CLASSES_LIMIT}; {SOURCE_KEY}")
    names = [str(name) for name in arrays["classes"]] if "classes" in arrays else [str(i) for i in range(highest + 1)]
    return ArraySource(names, images, labels, where=str(file))


def _read(file: Path) -> dict[str, NDArray[np.generic]]:
    if not file.is_file():
        raise UserError(f"{file}: not a regular file; {SOURCE_KEY}")
    try:
        with zipfile.ZipFile(file) as archive:
            names = [f"{key}.npy" for key in SPLIT_KEYS | SINGLE_KEYS | {"classes"}]
            return {name[:-4]: _array(archive, name, str(file)) for name in names if name in archive.namelist()}
    except UserError:
        raise
    except NPZ_ERRORS as error:
        raise UserError(f"{file}: not readable without unpickling ({one_line(error)}); {SOURCE_KEY}") from None


def _array(archive: zipfile.ZipFile, name: str, where: str) -> NDArray[np.generic]:
    """One array of an archive. What it claims to hold is compared with its size before anything is allocated."""
    info = archive.getinfo(name)
    check_size(f"{where}: {name}", info.file_size, info.compress_size)
    with archive.open(info) as stream:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(stream)
        if dtype.hasobject:
            raise UserError(f"{where}: {name} is not readable without unpickling; {SOURCE_KEY}")
        if math.prod(shape) * dtype.itemsize != info.file_size - stream.tell():
            raise UserError(f"{where}: {name} has shape {shape} in {info.file_size} bytes: damaged; {SOURCE_KEY}")
    with archive.open(info) as stream:
        return np.lib.format.read_array(stream, allow_pickle=False)


def _images(file: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> Pixels:
    array = arrays[key]
    if array.dtype != np.uint8:
        raise UserError(f"{file}: {key} is {array.dtype}, uint8 expected; {SOURCE_KEY}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[3] not in (1, 3):
        raise UserError(f"{file}: {key} has shape {arrays[key].shape}, (N,H,W), (N,H,W,C) expected; {SOURCE_KEY}")
    return np.ascontiguousarray(array).view(np.uint8)


def _labels(file: Path, arrays: dict[str, NDArray[np.generic]], key: str) -> NDArray[np.int64]:
    array = arrays[key]
    if not np.issubdtype(array.dtype, np.integer) or array.size != len(array):
        raise UserError(f"{file}: {key} is {array.dtype} {array.shape}, whole numbers (N,) expected; {SOURCE_KEY}")
    return array.reshape(-1).astype(np.int64)
