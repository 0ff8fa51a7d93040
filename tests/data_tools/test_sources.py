"""Every source against arrays known beforehand, and every kind of damage by name."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from raw_data import cifar_files, idx_bytes, images, png, raw, write_folder, write_idx, write_tar

from data_tools.sources import open_source
from data_tools.sources.base import Source, holdout
from trainer.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"


def contents(source: Source, split: str) -> tuple[NDArray[np.uint8], list[int]]:
    pairs = list(source.samples(split, range(len(source.class_names))))
    return np.stack([source.load(split, id) for id, _ in pairs]), [label for _, label in pairs]


def check(source: Source, arrays: Any) -> None:
    for split in ("train", "test"):
        pixels, labels = contents(source, split)
        assert np.array_equal(pixels, arrays[split][0]) and labels == arrays[split][1]


def check_wanted(source: Source) -> None:
    """Asking for some classes gives the same ids as asking for all."""
    every = list(source.samples("train", range(len(source.class_names))))
    assert list(source.samples("train", {1})) == [pair for pair in every if pair[1] == 1]


def test_digits() -> None:
    from sklearn.datasets import load_digits

    source = open_source("digits", "", "digits", None)
    train, test = contents(source, "train"), contents(source, "test")
    assert (len(train[0]), len(test[0])) == (1438, 359) and source.class_names == list("0123456789")
    bunch: Any = load_digits()
    scaled = np.rint(bunch.images / 16 * 255).astype(int)
    expected = sorted((*image.ravel().tolist(), label) for image, label in zip(scaled, bunch.target, strict=True))
    pairs = [pair for part in (train, test) for pair in zip(*part, strict=True)]
    assert sorted((*image.ravel().tolist(), label) for image, label in pairs) == expected
    share = np.bincount(test[1]) / np.bincount(bunch.target)
    assert np.abs(share - 0.2).max() < 0.005


@pytest.mark.parametrize("compress", [True, False])
def test_idx(tmp_path: Path, compress: bool) -> None:
    arrays = raw(7, 1, 3)
    source = open_source("idx", str(write_idx(tmp_path, arrays, compress)), "mnist", None)
    check(source, arrays)
    check_wanted(source)
    assert source.class_names == ["0", "1", "2"]


def test_idx_names_fashion_mnist(tmp_path: Path) -> None:
    source = open_source("idx", str(write_idx(tmp_path, raw(4, 1, 10))), "fashion_mnist", None)
    assert source.class_names[0] == "T-shirt/top" and source.class_names[9] == "Ankle boot"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"not gzip", "damaged"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8)))[:-9], "damaged"),
        (gzip.compress(b"\x00\x00\x0d\x03" + bytes(12)), "not an IDX file"),
        (gzip.compress(b"\x00\x00"), "not an IDX file"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8))[:-1]), "header promises"),
        (gzip.compress(idx_bytes(np.zeros((2, 3, 3), np.uint8)) + b"x"), "header promises"),
        (gzip.compress(b"\x00\x00\x08\x03" + b"\xff" * 12), "header promises"),
    ],
)
def test_idx_damage_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    write_idx(tmp_path, raw(7, 1, 3))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(data)
    with pytest.raises(UserError, match=rf"train-images-idx3-ubyte\.gz: .*{message}|.*-ubyte\.gz: {message}"):
        open_source("idx", str(tmp_path), "mnist", None)


def test_idx_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_idx(tmp_path, raw(7, 1, 3))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros(2, np.uint8))))
    with pytest.raises(UserError, match="6 test images, 2 labels"):
        open_source("idx", str(tmp_path), "mnist", None)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz missing; key data\.source_path"):
        open_source("idx", str(tmp_path), "mnist", None)


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("form", ["archive", "folder of archive", "bins", "folder of bins"])
def test_cifar(tmp_path: Path, classes: int, form: str) -> None:
    arrays = raw(32, 3, classes, train=2, test=1)
    files = cifar_files(arrays, classes)
    inner = "cifar-10-batches-bin" if classes == 10 else "cifar-100-binary"
    archive = tmp_path / f"cifar-{classes}-binary.tar.gz"
    if "archive" in form:
        write_tar(archive, {f"{inner}/{name}": data for name, data in files.items()}, "w:gz")
    else:
        for name, data in files.items():
            path = (tmp_path / inner if form == "folder of bins" else tmp_path) / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    source = open_source(f"cifar{classes}", str(archive if form == "archive" else tmp_path), "cifar", None)
    check(source, arrays)
    assert len(source.class_names) == classes and source.class_names == sorted(source.class_names)


@pytest.mark.parametrize("classes", [10, 100])
def test_cifar_pickles_are_refused_with_a_word_on_the_binary_archive(tmp_path: Path, classes: int) -> None:
    archive = tmp_path / f"cifar-{classes}-python.tar.gz"
    archive.write_bytes(b"")
    batches = tmp_path / ("cifar-10-batches-py" if classes == 10 else "cifar-100-python")
    batches.mkdir()
    (batches / ("data_batch_1" if classes == 10 else "train")).write_bytes(b"")
    for path in (archive, tmp_path, batches):
        with pytest.raises(UserError, match=rf"pickle, which is never read: take cifar-{classes}-binary\.tar\.gz"):
            open_source(f"cifar{classes}", str(path), "cifar", None)


def test_cifar_damage_is_named(tmp_path: Path) -> None:
    files = cifar_files(raw(32, 3, 10), 10)
    archive = write_tar(tmp_path / "a" / "cifar-10-binary.tar.gz", files, "w:gz")
    archive.write_bytes(archive.read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cifar-10-binary\.tar\.gz: damaged"):
        open_source("cifar10", str(archive), "cifar", None)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data[:-1] if name == "data_batch_3.bin" else data)
    with pytest.raises(UserError, match=r"data_batch_3\.bin: .*damaged"):
        open_source("cifar10", str(tmp_path), "cifar", None)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(UserError, match=r"data_batch_3\.bin missing"):
        open_source("cifar10", str(tmp_path), "cifar", None)
    (tmp_path / "data_batch_3.bin").write_bytes(bytes([200]) + bytes(3072))
    with pytest.raises(UserError, match=r"labels lie outside 0\.\.9"):
        open_source("cifar10", str(tmp_path), "cifar", None)


def by_class(arrays: Any, order: list[int]) -> Any:
    """Folders are read class by class."""
    result = {}
    for split, (pixels, labels) in arrays.items():
        rows = [row for label in order for row in range(len(labels)) if labels[row] == label]
        result[split] = (pixels[rows], [order.index(labels[row]) for row in rows])
    return result


def test_folder(tmp_path: Path) -> None:
    arrays = raw(6, 3, 3)
    write_folder(tmp_path, arrays, ["n1", "n2", "n3"])
    (tmp_path / "train" / "n1" / "notes.txt").write_text("not an image")
    source = open_source("folder", str(tmp_path), "x", None)
    assert source.class_names == ["n1", "n2", "n3"]
    check(source, by_class(arrays, [0, 1, 2]))
    check_wanted(source)


def test_a_class_list_picks_and_orders_and_ids_stay_when_it_grows(tmp_path: Path) -> None:
    arrays = raw(6, 3, 4)
    write_folder(tmp_path, arrays, ["n1", "n2", "n3", "n4"])
    source = open_source("folder", str(tmp_path), "x", ["n3", "n1"])
    check(source, by_class(arrays, [2, 0]))
    longer = open_source("folder", str(tmp_path), "x", ["n3", "n1", "n4"])
    assert list(longer.samples("train", {0, 1})) == list(source.samples("train", {0, 1}))
    missing = open_source("folder", str(tmp_path), "x", ["n3", "n9"])
    with pytest.raises(UserError, match=r"train/n9: missing \(class 'n9'\)"):
        list(missing.samples("train", {1}))


def test_class_folders_alone_are_split_once_and_for_all(tmp_path: Path) -> None:
    arrays = raw(4, 1, 2, train=30, test=0)
    write_folder(tmp_path / "all", {**arrays, "test": (images(0, 4, 1), [])}, ["a", "b"])
    root = tmp_path / "all" / "train"
    source = open_source("folder", str(root), "x", None)
    train, test = contents(source, "train"), contents(source, "test")
    assert np.bincount(train[1]).tolist() == [27, 27] and np.bincount(test[1]).tolist() == [3, 3]
    together = {image.tobytes() for image in (*train[0], *test[0])}
    assert together == {image.tobytes() for image in arrays["train"][0]}


def test_folder_damage_is_named(tmp_path: Path) -> None:
    write_folder(tmp_path, raw(6, 3, 2), ["a", "b"])
    broken = tmp_path / "train" / "a" / "000.png"
    broken.write_bytes(broken.read_bytes()[:60])
    source = open_source("folder", str(tmp_path), "x", None)
    id = next(source.samples("train", {0}))[0]
    with pytest.raises(UserError, match=r"train/a/000\.png: broken image"):
        source.load("train", id)
    (tmp_path / "val" / "flat.png").write_bytes(b"")
    for folder in ("a", "b"):
        for file in (tmp_path / "val" / folder).iterdir():
            file.unlink()
        (tmp_path / "val" / folder).rmdir()
    with pytest.raises(UserError, match="val: holds images, not class folders"):
        open_source("folder", str(tmp_path), "x", None)


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3), ("RGB", 3)]
)
def test_image_modes(tmp_path: Path, mode: str, channels: int) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(2):
        image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
        image.save(folder / f"{number}.jpg", "JPEG" if mode == "CMYK" else "PNG")  # a PNG named .jpg, as in ImageNet
    source = open_source("folder", str(tmp_path), "x", None)
    pixels = source.load("train", next(source.samples("train", {0}))[0])
    assert pixels.shape == (4, 5, channels) and pixels.dtype == np.uint8 and pixels.min() >= 245


def test_16_bit_images_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(np.full((4, 4), 60000, np.uint16)).save(folder / f"{number}.png")
    source = open_source("folder", str(tmp_path), "x", None)
    with pytest.raises(UserError, match="more than 8 bits"):
        source.load("train", next(source.samples("train", {0}))[0])


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_npz(tmp_path: Path, layout: str) -> None:
    arrays = raw(6, 1 if layout == "NHW" else 3, 3)
    stored = {split: _layout(pixels, layout) for split, (pixels, _) in arrays.items()}
    path = tmp_path / "a.npz"
    labels = {split: np.array(values).reshape(-1, 1) for split, (_, values) in arrays.items()}
    names = np.array(["x", "y", "z"])
    np.savez(
        path,
        x_train=stored["train"],
        x_test=stored["test"],
        y_train=labels["train"],
        y_test=labels["test"],
        classes=names,
    )
    source = open_source("npz", str(path), "x", None)
    check(source, arrays)
    check_wanted(source)
    assert source.class_names == ["x", "y", "z"]


def _layout(pixels: NDArray[np.uint8], layout: str) -> NDArray[np.uint8]:
    return {"NHW": pixels[..., 0], "NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2)}[layout]


def test_npz_of_one_set_is_split(tmp_path: Path) -> None:
    pixels, labels = raw(4, 1, 2, train=20)["train"]
    np.savez(tmp_path / "a.npz", images=pixels, labels=np.array(labels))
    source = open_source("npz", str(tmp_path / "a.npz"), "x", None)
    assert np.bincount(contents(source, "test")[1]).tolist() == [2, 2]
    assert np.bincount(contents(source, "train")[1]).tolist() == [18, 18]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": np.zeros((4, 5, 5), np.float32)}, "images is float32, uint8 expected"),
        ({"images": np.zeros((4, 5, 5, 2), np.uint8)}, "has shape"),
        ({"images": np.zeros((4, 25), np.uint8)}, "has shape"),
        ({"labels": np.zeros(4)}, "whole numbers"),
        ({"labels": np.zeros(3, int)}, "4 images, 3 labels"),
        ({"labels": np.array([0, 1, 1, -1])}, "lie outside"),
        ({"labels": np.array([{"a": 1}] * 4, dtype=object)}, "without unpickling"),
    ],
)
def test_npz_damage_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **({"images": np.zeros((4, 5, 5), np.uint8), "labels": np.array([0, 1, 0, 1])} | changes))
    with pytest.raises(UserError, match=rf"a\.npz.*{message}"):
        open_source("npz", str(path), "x", None)


def test_npz_that_is_none_is_named(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for name in ("other.npz", "single.npy", "text.npz", "none.npz"):
        with pytest.raises(UserError, match=rf"{name}: "):
            open_source("npz", str(tmp_path / name), "x", None)


def wds(path: Path, arrays: Any, split: str, rows: range, prefix: str = "") -> Path:
    pixels, labels = arrays[split]
    members = {}
    for row in rows:
        members[f"{prefix}{row:04d}.png"] = png(pixels[row])
        members[f"{prefix}{row:04d}.cls"] = f"{labels[row]}\n".encode()
    return write_tar(path, members)


@pytest.mark.parametrize(
    "names", [("train/a.tar", "val/a.tar"), ("train/a.tar", "test/a.tar"), ("train-0.tar", "test-0.tar")]
)
def test_webdataset(tmp_path: Path, names: tuple[str, str]) -> None:
    arrays = raw(5, 3, 3)
    wds(tmp_path / names[0], arrays, "train", range(12), prefix="some/dir/")
    wds(tmp_path / names[1], arrays, "test", range(6))
    source = open_source("webdataset", str(tmp_path), "x", None)
    check(source, arrays)
    check_wanted(source)


def test_webdataset_of_one_set_is_split(tmp_path: Path) -> None:
    arrays = raw(4, 1, 2, train=20)
    wds(tmp_path / "part-0.tar", arrays, "train", range(30))
    wds(tmp_path / "part-1.tar", arrays, "train", range(30, 40))
    source = open_source("webdataset", str(tmp_path), "x", None)
    assert np.bincount(contents(source, "test")[1]).tolist() == [2, 2]
    assert len(contents(source, "train")[1]) == 36


def test_webdataset_damage_is_named(tmp_path: Path) -> None:
    path = wds(tmp_path / "a.tar", raw(4, 1, 2, train=20), "train", range(20))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        boundary = tar.getmembers()[20].offset
    for cut in (boundary, boundary + 100, boundary + 520):  # between members, in a header, in an image
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"a\.tar: (damaged|cut short)"):
            open_source("webdataset", str(path), "x", None)
    image = png(images(1, 4, 1)[0])
    for members, message in (
        ({"a.png": image}, "sample a has not both"),
        ({"a.cls": b"1"}, "sample a has not both"),
        ({"a.png": image, "a.cls": b"cat"}, "label 'cat' is not a whole number"),
    ):
        write_tar(path, members)
        with pytest.raises(UserError, match=rf"a\.tar: .*{message}"):
            open_source("webdataset", str(path), "x", None)
    with pytest.raises(UserError, match="holds no tars"):
        (tmp_path / "empty").mkdir()
        open_source("webdataset", str(tmp_path / "empty"), "x", None)


def test_webdataset_broken_image_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.{e}": b"0" for i in range(4) for e in ("png", "cls")})
    source = open_source("webdataset", str(path), "x", None)
    with pytest.raises(UserError, match=r"a\.tar: sample \d: broken image"):
        source.load("train", 0)


@pytest.mark.parametrize("source", ["idx", "cifar10", "cifar100", "folder", "npz", "webdataset"])
def test_raw_images_that_are_not_there_are_named(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match=r"data\.source_path is empty"):
        open_source(source, "", "x", None)
    with pytest.raises(UserError, match=r"nowhere: missing .*key data\.source_path"):
        open_source(source, str(tmp_path / "nowhere"), "x", None)


def test_an_unknown_source_is_named() -> None:
    with pytest.raises(UserError, match=r"data\.source=svhn: must be one of digits, idx"):
        open_source("svhn", "", "x", None)


def test_holdout_of_a_class_does_not_depend_on_later_classes() -> None:
    labels = np.array([0] * 20 + [1] * 11 + [2])
    test = holdout(labels, 0.1)
    assert test[:20].sum() == 2 and test[20:31].sum() == 1 and not test[31]
    assert np.array_equal(holdout(labels[:20], 0.1), test[:20])


@pytest.mark.skipif(not (REAL / "fashion-mnist").is_dir(), reason="real Fashion-MNIST is not on this machine")
def test_real_fashion_mnist() -> None:
    source = open_source("idx", str(REAL / "fashion-mnist"), "fashion_mnist", None)
    for split, count in (("train", 6000), ("test", 1000)):
        labels = [label for _, label in source.samples(split, range(10))]
        assert np.bincount(labels).tolist() == [count] * 10
    boot = source.load("train", 0)  # the first training image is an ankle boot: dark above, bright below
    assert boot.shape == (28, 28, 1) and boot[:3].max() == 0 and boot[20].mean() > 100


@pytest.mark.skipif(not (REAL / "tiny_imagenet_100").is_dir(), reason="real ImageNet images are not on this machine")
def test_real_imagenet_jpegs(tmp_path: Path) -> None:
    with np.load(REAL / "tiny_imagenet_100" / "val.npz", allow_pickle=False) as archive:
        jpeg, offsets, labels = archive["jpeg"], archive["offsets"], archive["labels"]
    for row in range(120):
        path = tmp_path / f"c{labels[row]:03d}" / f"{row}.JPEG"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(jpeg[offsets[row] : offsets[row + 1]].tobytes())
    source = open_source("folder", str(tmp_path), "x", None)
    pairs = list(source.samples("train", range(len(source.class_names))))
    image = source.load("train", pairs[0][0])
    assert image.shape[:2] == (64, 64)
    assert len(pairs) + len(list(source.samples("test", range(len(source.class_names))))) == 120
