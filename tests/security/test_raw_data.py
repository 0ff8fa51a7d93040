"""Hostile raw data: every source refuses it in one line, quickly, with nothing unpickled."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.sources import open_source
from tests.security.hostile import (
    NO_FILES,
    QUICK,
    TEN_GB,
    Trap,
    huge_npy,
    huge_webp,
    no_file,
    pickled,
    pickled_npy,
    pixel_bomb,
    png,
    refused,
    sparse,
    tar_header,
    tar_of,
    text_bomb,
)
from trainer.errors import UserError

pytestmark = QUICK


def npz(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


LABELS = npy(np.zeros(4, np.int64))
IMAGES = npy(np.zeros((4, 2, 2), np.uint8))


@pytest.mark.parametrize(
    "members",
    [
        lambda trap: {"images.npy": pickled_npy(trap), "labels.npy": LABELS},
        lambda trap: {"images.npy": pickled(trap), "labels.npy": LABELS},
        lambda trap: {"images.npy": IMAGES, "labels.npy": LABELS, "classes.npy": pickled_npy(trap)},
        lambda trap: {"images.npy": huge_npy("|u1", (8, 8)), "labels.npy": LABELS},
        lambda trap: {"images.npy": npy(np.zeros((100, 1000, 1000), np.uint8)), "labels.npy": LABELS},
        lambda trap: {"images.npy": IMAGES, "labels.npy": npy(np.full(4, 2**62))},
        lambda trap: {"../images.npy": IMAGES, "/labels.npy": LABELS},
        lambda trap: {"images.npy": IMAGES[:6] + b"\x09" + IMAGES[7:], "labels.npy": LABELS},
    ],
)
def test_npz(tmp_path: Path, trap: Trap, members: Callable[[Trap], dict[str, bytes]]) -> None:
    path = npz(tmp_path / "raw.npz", members(trap))
    refused(lambda: open_source("npz", str(path), "x", None), UserError, str(path))


@pytest.mark.parametrize("content", [pickled, pickled_npy, lambda trap: huge_npy("|u1", (8, 8))])
def test_npz_that_is_none(tmp_path: Path, trap: Trap, content: Callable[[Trap], bytes]) -> None:
    path = tmp_path / "raw.npz"
    path.write_bytes(content(trap))
    refused(lambda: open_source("npz", str(path), "x", None), UserError, str(path))


def idx(count: int, dimensions: int, data: bytes) -> bytes:
    sizes = (count, 64, 64) if dimensions == 3 else (count,)
    return struct.pack(f">4B{dimensions}I", 0, 0, 8, dimensions, *sizes) + data


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("count", [TEN_GB // 64**2, 2**32 - 1])
def test_idx_headers_that_claim_gigabytes(tmp_path: Path, packed: bool, count: int) -> None:
    name = "train-images-idx3-ubyte"
    data = idx(count, 3, bytes(1 << 20))
    (tmp_path / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(data) if packed else data)
    refused(lambda: open_source("idx", str(tmp_path), "x", None), UserError, name)


CIFAR = "cifar-10-binary.tar.gz"


@pytest.mark.parametrize(
    "data",
    [
        tar_header("data_batch_1.bin", TEN_GB),
        tar_header("data_batch_1.bin", -512) * 4,
        tar_header("x", TEN_GB, b"L"),
        tar_header("data_batch_1.bin", 0, b"2", "/etc/passwd"),
        tar_of([("../data_batch_1.bin", b"x")]),
        bytes(270 << 20),
    ],
)
def test_cifar(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / CIFAR
    path.write_bytes(gzip.compress(data, 1))
    refused(lambda: open_source("cifar10", str(path), "x", None), UserError, str(path))


def sample(image: bytes, extension: str = "png") -> bytes:
    return tar_of([pair for key in "abcd" for pair in ((f"{key}.{extension}", image), (f"{key}.cls", b"0"))])


GOOD = sample(png(4, 4))


@pytest.mark.parametrize(
    "data",
    [
        tar_header("a.png", TEN_GB) + GOOD,
        tar_header("a.cls", TEN_GB) + GOOD,
        tar_header("x", -512) * 4 + GOOD,
        tar_header("x", TEN_GB, b"L") + GOOD,
        tar_header("x", 0, b"L") * 5000 + GOOD,
        tar_header("e.png", 0, b"2", "../../etc/passwd") + tar_of([("e.cls", b"0")]),
        tar_header("e.png", 0, b"1", "/etc/passwd") + tar_of([("e.cls", b"0")]),
        tar_header("e.cls", 0, b"2", "/etc/passwd") + tar_of([("e.png", png(4, 4))]),
        tar_of([("a.png", png(4, 4)), ("a.cls", b"9" * 30)]),
        tar_of([("a.png", png(4, 4)), ("a.cls", b"\x80\x04.")]),
    ],
)
def test_webdataset(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(data)
    refused(lambda: open_source("webdataset", str(path), "x", None), UserError, str(path))


def test_webdataset_leaves_other_members_alone(tmp_path: Path, trap: Trap) -> None:
    """Pickles and names that climb are no images: not opened, not written anywhere."""
    path = tmp_path / "folder" / "a.tar"
    path.parent.mkdir()
    hostile = [(name, pickled(trap)) for name in ("x.pkl", "x.pyd", "x.pth", "../x.npy", f"{tmp_path}/y.pickle")]
    path.write_bytes(tar_of(hostile)[: 1024 * len(hostile)] + GOOD)
    source = open_source("webdataset", str(path), "x", None)
    assert [source.load(split, 0).shape for split in ("train", "test")] == [(4, 4, 1)] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


IMAGENET = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
WNID = "n01440764"


@pytest.mark.parametrize(
    "train",
    [
        b"",
        bytes(10240),
        tar_header(f"{WNID}.tar", TEN_GB),
        tar_header(f"{WNID}.tar", -512) * 4,
        tar_header(f"{WNID}.tar", 0, b"2", "/etc/passwd") + bytes(1024),
        tar_of([(f"{WNID}.tar", b"no tar" * 200)]),
        tar_of([(f"{WNID}.tar", tar_header("a.JPEG", TEN_GB))]),
        tar_of([(f"../{WNID}.tar", tar_header("a.JPEG", 0, b"2", "/etc/passwd"))]),
    ],
)
def test_imagenet_tars(tmp_path: Path, train: bytes) -> None:
    for name, data in zip(IMAGENET, (train, tar_of([("ILSVRC2012_val_00000001.JPEG", png(4, 4))])), strict=True):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "val_labels.txt").write_text(f"ILSVRC2012_val_00000001.JPEG {WNID}\n")
    refused(lambda: list(open_source("imagenet", str(tmp_path), "x", [WNID]).samples("train", {0})), UserError, "train")


@pytest.mark.parametrize("kind", ["pickle", "bomb", "list"])
def test_imagenet_labels(tmp_path: Path, trap: Trap, kind: str) -> None:
    """A meta.mat that is a pickle, an archive that unpacks to gigabytes, a list that is no text."""
    for name in IMAGENET:
        (tmp_path / name).write_bytes(tar_of([("ILSVRC2012_val_00000001.JPEG", png(4, 4))]))
    if kind == "pickle":
        (tmp_path / "meta.mat").write_bytes(pickled(trap))
        (tmp_path / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n")
    elif kind == "bomb":
        (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(bytes(200 << 20), 1))
    else:
        (tmp_path / "val_labels.txt").write_bytes(pickled(trap))
    refused(lambda: list(open_source("imagenet", str(tmp_path), "x", [WNID]).samples("test", {0})), UserError, "")


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(64) + b"\xff\xff\xff\x7fPAR1", b"PAR1" * 99])
def test_parquet(tmp_path: Path, data: bytes) -> None:
    pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")  # its import is not watched
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    refused(lambda: open_source("parquet", str(path), "x", None), UserError, str(path))


IMAGES_MADE_TO_HURT = pytest.mark.parametrize(
    ("extension", "data"),
    [
        ("png", pixel_bomb(30_000, 30_000)),
        ("png", pixel_bomb(2**31 - 1, 8)),
        ("png", pixel_bomb(12_000, 12_000)),
        ("png", text_bomb(4, 200)),
        ("webp", huge_webp()),
    ],
)


@IMAGES_MADE_TO_HURT
def test_images_in_tars(tmp_path: Path, extension: str, data: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(sample(data, extension))
    source = open_source("webdataset", str(path), "x", None)
    refused(lambda: source.load("train", 0), UserError, str(path))


def folder(root: Path, image: bytes, name: str) -> Path:
    for split in ("train", "val"):
        (root / split / "cat").mkdir(parents=True)
        (root / split / "cat" / name).write_bytes(image)
    return root / "train" / "cat" / name


@IMAGES_MADE_TO_HURT
def test_images_in_folders(tmp_path: Path, extension: str, data: bytes) -> None:
    path = folder(tmp_path, data, f"1.{extension}")
    source = open_source("folder", str(tmp_path), "x", None)
    ((id, _),) = source.samples("train", {0})
    refused(lambda: source.load("train", id), UserError, str(path))


@NO_FILES
def test_files_that_are_none(tmp_path: Path, kind: str) -> None:
    for source, path in (
        ("npz", tmp_path / "raw.npz"),
        ("webdataset", tmp_path / "tars" / "a.tar"),
        ("cifar10", tmp_path / CIFAR),
        ("idx", tmp_path / "idx" / "train-images-idx3-ubyte"),
    ):
        no_file(path, kind)
        given = path.parent if source in ("webdataset", "idx") else path
        refused(lambda source=source, given=given: open_source(source, str(given), "x", None), UserError, str(given))


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_images_that_are_no_files(tmp_path: Path, kind: str) -> None:
    path = folder(tmp_path, b"", "1.png")
    no_file(path, kind)
    source = open_source("folder", str(tmp_path), "x", None)
    ((id, _),) = source.samples("train", {0})
    refused(lambda: source.load("train", id), UserError, str(path))


def test_large_files_of_nothing(tmp_path: Path) -> None:
    for source, name in (("npz", "raw.npz"), ("cifar10", CIFAR), ("folder", "images")):
        path = sparse(tmp_path / name)
        refused(lambda source=source, path=path: open_source(source, str(path), "x", None), UserError, str(path))
        path.unlink()
