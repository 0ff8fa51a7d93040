"""ImageNet in the forms in which people have it: the same images, and the same bytes of the shards."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagenet_files import (
    LABEL_FORMS,
    LISTED,
    WNIDS,
    Tree,
    jpeg,
    kit_files,
    make_tree,
    parquet_rows,
    val_images,
    write_class_folders,
    write_flat_val,
    write_imagenet_tars,
    write_labels,
    write_parquet,
)
from PIL import Image
from raw_data import write_tar

from data_tools.build import build
from data_tools.sources import open_source
from data_tools.sources.base import Source
from data_tools.spec import BuildSpec
from data_tools.verify import verify
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.errors import UserError

TRAIN_TAR, VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


@pytest.fixture(scope="module")
def tree() -> Tree:
    return make_tree()


def shards(root: Path) -> dict[str, str]:
    """Checksums of all tars."""
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in root.rglob("*.tar")}


def class_list(folder: Path) -> str:
    path = folder / "classes.txt"
    path.write_text("\n".join(LISTED) + "\n")
    return str(path)


def build_from(tmp_path: Path, source: str, path: Path, **changes: Any) -> Path:
    root = tmp_path / f"out-{source}"
    given = {"tasks": [[2, 0], [1]], "image_size": 8, "channels": 3, "shard_size": 5, **changes}
    build(BuildSpec("i", source, source_path=str(path), class_list=class_list(tmp_path), **given), root, False)
    assert not verify(root).damage
    return root


def listed(source: Source, split: str) -> list[tuple[int, int]]:
    return list(source.samples(split, range(len(source.class_names))))


def test_tars_give_what_their_unpacked_files_give(tmp_path: Path, tree: Tree) -> None:
    folders = write_class_folders(tmp_path / "folders", tree)
    tars = write_imagenet_tars(tmp_path / "tars", tree)
    write_labels(tars, tree, "list")
    one, other = (open_source(*pair, "x", LISTED) for pair in (("folder", str(folders)), ("imagenet", str(tars))))
    for split, count in (("train", 18), ("test", 6)):
        assert len(listed(one, split)) == count and listed(one, split) == listed(other, split)
        assert list(one.samples(split, {1})) == list(other.samples(split, {1}))
        for id, _ in listed(one, split):
            assert np.array_equal(one.load(split, id), other.load(split, id))
    assert open_source("imagenet", str(tars), "x", None).class_names == WNIDS
    expected = shards(build_from(tmp_path, "folder", folders))
    assert len(expected) == 3 + 2 + 1 + 1 and shards(build_from(tmp_path, "imagenet", tars)) == expected


def test_parquet_gives_the_same_shards_where_its_rows_have_that_order(tmp_path: Path, tree: Tree) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'palimpsest[parquet]')")
    expected = shards(build_from(tmp_path, "folder", write_class_folders(tmp_path / "folders", tree)))
    write_parquet(tmp_path / "parquet" / "data" / "train-0-of-1.parquet", parquet_rows(tree, "train"))
    write_parquet(tmp_path / "parquet" / "data" / "validation-0-of-1.parquet", parquet_rows(tree, "val"))
    assert shards(build_from(tmp_path, "parquet", tmp_path / "parquet")) == expected


def test_tars_of_other_classes_are_not_read(tmp_path: Path, tree: Tree) -> None:
    """WNIDS[0] is not listed; its tar is none."""
    tars = write_imagenet_tars(tmp_path / "tars", tree)
    write_labels(tars, tree, "list")
    whole = shards(build_from(tmp_path / "tars", "imagenet", tars))
    path = tars / TRAIN_TAR
    data = path.read_bytes()
    spoilt = b"\xff" * sum(map(len, tree["train"][WNIDS[0]].values()))
    at = data.index(f"{WNIDS[0]}_".encode())
    path.write_bytes(data[:at] + spoilt + data[at + len(spoilt) :])
    assert shards(build_from(tmp_path, "imagenet", tars)) == whole
    with pytest.raises(UserError, match=r"img_train\.tar: (damaged|cut short)"):
        listed(open_source("imagenet", str(tars), "x", WNIDS), "train")


@pytest.mark.parametrize("form", LABEL_FORMS)
def test_labels_of_the_validation_images(tmp_path: Path, tree: Tree, form: str) -> None:
    folders = write_flat_val(write_class_folders(tmp_path / "folders", tree, ["train"]), tree)
    write_labels(folders / "val" if form == "tiny" else folders, tree, form)
    tars = write_imagenet_tars(tmp_path / "tars", tree)
    write_labels(tars, tree, form)
    sorted_out = open_source("folder", str(write_class_folders(tmp_path / "sorted", tree)), "x", LISTED)
    for source in (open_source("folder", str(folders), "x", LISTED), open_source("imagenet", str(tars), "x", LISTED)):
        assert listed(source, "test") == listed(sorted_out, "test")
        for id, _ in listed(source, "test"):
            assert np.array_equal(source.load("test", id), sorted_out.load("test", id))


def test_tiny_imagenet_as_it_is_shipped(tmp_path: Path, tree: Tree) -> None:
    """train/<wnid>/images/*.JPEG, val/images/*.JPEG and val/val_annotations.txt"""
    for wnid, images in tree["train"].items():
        write_class_folders(tmp_path / wnid, {"images": {wnid: images}}, ["images"])
        (tmp_path / "tiny" / "train" / wnid).mkdir(parents=True)
        (tmp_path / wnid / "images" / wnid).rename(tmp_path / "tiny" / "train" / wnid / "images")
    write_flat_val(tmp_path / "flat", tree)
    (tmp_path / "tiny" / "val").mkdir()
    (tmp_path / "flat" / "val").rename(tmp_path / "tiny" / "val" / "images")
    write_labels(tmp_path / "tiny" / "val", tree, "tiny")
    source = open_source("folder", str(tmp_path / "tiny"), "x", LISTED)
    assert [label for _, label in listed(source, "test")] == [0, 0, 1, 1, 2, 2] and len(listed(source, "train")) == 18


def test_what_is_wrong_with_labels_is_named(tmp_path: Path, tree: Tree) -> None:
    tars = write_imagenet_tars(tmp_path / "tars", tree)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message) as error:
            listed(open_source("imagenet", str(tars), "x", LISTED), "test")
        assert "\n" not in str(error.value) and "data.source_path" in str(error.value)

    refused(r"labels of ILSVRC2012_img_val\.tar missing: one of ILSVRC2012_devkit_t12\.tar\.gz, ")
    (tars / "val_labels.txt").write_text("nothing of use\n")
    refused(r"val_labels\.txt: has no line `name wnid`")
    (tars / "val_labels.txt").write_text(f"{val_images(tree)[0][0]} {WNIDS[0]}\n")
    refused(r"ILSVRC2012_val_00000002\.JPEG has no label")
    (tars / "val_labels.txt").unlink()
    kit = kit_files(tree)
    (tars / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"no archive")
    refused(r"devkit_t12\.tar\.gz: damaged")
    for name, data in kit.items():
        (tars / name).write_bytes(data)
    (tars / "meta.mat").write_bytes(kit["meta.mat"][:90])
    refused(r"meta\.mat: not the synsets of ImageNet")
    (tars / "meta.mat").write_bytes(kit["meta.mat"])
    (tars / "ILSVRC2012_validation_ground_truth.txt").write_text("1\n77\n")
    refused(r"an id that meta\.mat does not know \(77\)")


def test_what_is_wrong_with_tars_is_named(tmp_path: Path, tree: Tree) -> None:
    tars = write_imagenet_tars(tmp_path / "tars", tree)
    write_labels(tars, tree, "list")
    with pytest.raises(UserError, match=r"n99999999\.tar missing \(class 'n99999999'\)"):
        listed(open_source("imagenet", str(tars), "x", ["n99999999"]), "train")
    train = (tars / TRAIN_TAR).read_bytes()
    for cut in (0, 100, len(train) // 2, train.index(b"n01440764.tar\0")):  # the last: between two members
        (tars / TRAIN_TAR).write_bytes(train[:cut])
        with pytest.raises(UserError, match=r"img_train\.tar: (damaged|cut short)"):
            listed(open_source("imagenet", str(tars), "x", LISTED), "train")
    inner = write_tar(tmp_path / "inner.tar", tree["train"][LISTED[0]]).read_bytes()
    write_tar(tars / TRAIN_TAR, {f"{LISTED[0]}.tar": inner[: inner.rindex(LISTED[0].encode())]})
    with pytest.raises(UserError, match=rf"{LISTED[0]}\.tar: cut short"):
        listed(open_source("imagenet", str(tars), "x", LISTED[:1]), "train")
    write_tar(tars / TRAIN_TAR, {"readme.txt": b"x"})
    with pytest.raises(UserError, match=r"img_train\.tar: holds no tars"):
        open_source("imagenet", str(tars), "x", None)
    (tars / VAL_TAR).unlink()
    with pytest.raises(UserError, match=r"ILSVRC2012_img_val\.tar missing"):
        open_source("imagenet", str(tars), "x", None)


def rule(data: bytes, size: int, channels: int = 3) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The documented rule, by Pillow alone and not by way of arrays."""
    image = Image.open(io.BytesIO(data))
    image = image.convert("L" if image.mode == "L" else "RGB")
    width, height = image.size
    shorter = min(width, height)
    image = image.resize((round(width * size / shorter), round(height * size / shorter)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size)).convert("RGB" if channels == 3 else "L")
    return np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)


def odd_images() -> dict[str, bytes]:
    """What there is in ImageNet beside ordinary JPEGs, and sizes of all kinds."""
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(5).integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(png, "PNG")
    return {
        "plain": jpeg(500, 375, 1),
        "upright": jpeg(333, 500, 2),
        "long": jpeg(1200, 100, 3),
        "progressive": jpeg(480, 360, 4, progressive=True, subsampling=0),
        "grey": jpeg(400, 300, 5, mode="L"),
        "cmyk": jpeg(400, 300, 6, mode="CMYK"),
        "turned": jpeg(300, 200, 7, exif=exif),
        "png": png.getvalue(),
        "exact": jpeg(64, 64, 8),
        "small": jpeg(50, 40, 9),
    }


@pytest.mark.parametrize("size", [64, 256])
def test_images_are_brought_to_size_by_the_documented_rule(tmp_path: Path, size: int) -> None:
    images = {f"n01440764_{name}.JPEG": data for name, data in odd_images().items()}
    root = write_class_folders(tmp_path / "raw", {"train": {"n01440764": images}, "val": {"n01440764": images}})
    spec = BuildSpec("i", "folder", [[0]], size, 3, source_path=str(root), small_images="enlarge")
    build(spec, tmp_path / "out", False)
    data = TaskData.open(tmp_path / "out", "train", [1], Verify.sha256)
    pixels = data.read(np.arange(len(data)))
    for key, image in zip(data.sample_keys, pixels, strict=True):
        name = sorted(images)[int(key.removeprefix("train-"))]
        assert np.array_equal(image, rule(images[name], size)), name


def test_small_images_are_padded_unless_told_otherwise(tmp_path: Path) -> None:
    images = {"n01440764_1.JPEG": jpeg(50, 40, 1)}
    raw = write_class_folders(tmp_path / "raw", {"train": {"n01440764": images}, "val": {"n01440764": images}})
    spec = BuildSpec("i", "folder", [[0]], 64, 3, source_path=str(raw))
    build(spec, tmp_path / "out", False)
    image = TaskData.open(tmp_path / "out", "train", [1], Verify.sha256).read(np.arange(1))[0]
    inner = np.asarray(Image.open(io.BytesIO(images["n01440764_1.JPEG"]))).transpose(2, 0, 1)
    assert np.array_equal(image[:, 12:52, 7:57], inner) and image.sum() == inner.sum()
    with pytest.raises(UserError, match=r"data\.small_images \(built with 'pad', wanted 'enlarge'\)"):
        build(BuildSpec(**{**spec.__dict__, "small_images": "enlarge"}), tmp_path / "out", False)
    with pytest.raises(UserError, match=r"data\.small_images=shrink: must be pad or enlarge"):
        build(BuildSpec(**{**spec.__dict__, "small_images": "shrink"}), tmp_path / "new", False)
