"""Small raw data sets in the formats of the sources."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Arrays = dict[str, tuple[NDArray[np.uint8], list[int]]]  # by split: images (N,H,W,C), labels


def images(count: int, size: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def raw(size: int, channels: int, classes: int, train: int = 4, test: int = 2) -> Arrays:
    """`train` and `test` images of each class, classes taking turns."""
    return {
        split: (images(count * classes, size, channels, seed), [i % classes for i in range(count * classes)])
        for seed, (split, count) in enumerate((("train", train), ("test", test)))
    }


def idx_bytes(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, arrays: Arrays, compress: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, prefix in (("train", "train"), ("test", "t10k")):
        pixels, labels = arrays[split]
        for stem, array in (("images-idx3", pixels[..., 0]), ("labels-idx1", np.array(labels, np.uint8))):
            data = idx_bytes(array)
            name = f"{prefix}-{stem}-ubyte"
            (folder / (f"{name}.gz" if compress else name)).write_bytes(gzip.compress(data) if compress else data)
    return folder


def cifar_bytes(pixels: NDArray[np.uint8], labels: list[int], fine: bool) -> bytes:
    records = []
    for image, label in zip(pixels, labels, strict=True):
        records.append((bytes([label // 5]) if fine else b"") + bytes([label]) + image.transpose(2, 0, 1).tobytes())
    return b"".join(records)


def cifar_files(arrays: Arrays, classes: int) -> dict[str, bytes]:
    (train, train_labels), (test, test_labels) = arrays["train"], arrays["test"]
    if classes == 100:
        return {"train.bin": cifar_bytes(train, train_labels, True), "test.bin": cifar_bytes(test, test_labels, True)}
    files = {}
    for number, rows in enumerate(np.array_split(np.arange(len(train)), 5), 1):
        files[f"data_batch_{number}.bin"] = cifar_bytes(train[rows], [train_labels[row] for row in rows], False)
    return {**files, "test_batch.bin": cifar_bytes(test, test_labels, False)}


def write_tar(path: Path, files: dict[str, bytes], mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(image_HWC: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC[..., 0] if image_HWC.shape[2] == 1 else image_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, arrays: Arrays, names: list[str]) -> Path:
    """train/<class>/*.png and val/<class>/*.png"""
    for split, folder in (("train", "train"), ("test", "val")):
        for row, (image, label) in enumerate(zip(*arrays[split], strict=True)):
            path = root / folder / names[label] / f"{row:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
    return root
