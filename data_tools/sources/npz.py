"""Arrays in an .npz file: x_train, y_train, x_test, y_test; or images, labels, split by a fixed stratified tenth."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.sources.base import SOURCE_KEY, ArraySource, Pixels, require_path, split_arrays
from trainer.errors import UserError

TEST_FRACTION = 0.1
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
    names = [str(name) for name in arrays["classes"]] if "classes" in arrays else [str(i) for i in range(highest + 1)]
    return ArraySource(names, images, labels, where=str(file))


def _read(file: Path) -> dict[str, NDArray[np.generic]]:
    try:
        loaded = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            raise UserError(f"{file}: a single array, not an .npz file; {SOURCE_KEY}")
        with loaded as archive:
            wanted = (SPLIT_KEYS | SINGLE_KEYS | {"classes"}) & set(archive.files)
            return {key: archive[key] for key in wanted}
    except UserError:
        raise
    except (OSError, ValueError, EOFError, KeyError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{file}: not readable without unpickling ({error}); {SOURCE_KEY}") from None


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
