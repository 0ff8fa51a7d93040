"""ImageNet in small, in the forms in which people have it."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from raw_data import write_tar
from scipy.io import savemat

WNIDS = ["n01440764", "n01443537", "n02097298", "n03126707"]
LISTED = ["n03126707", "n01443537", "n02097298"]  # a class list: an order of its own, and not all of them
KIT = "ILSVRC2012_devkit_t12"
Tree = dict[str, dict[str, dict[str, bytes]]]  # split, wnid, name: bytes


def jpeg(width: int, height: int, seed: int, mode: str = "RGB", **options: Any) -> bytes:
    """A smooth random picture."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90, **options)
    return buffer.getvalue()


def make_tree(train: int = 6, val: int = 2, sizes: Sequence[tuple[int, int]] = ((20, 15), (15, 22), (8, 8))) -> Tree:
    """So many images of each class; validation images are numbered over all classes, in no order of classes."""
    tree: Tree = {"train": {}, "val": {wnid: {} for wnid in WNIDS}}
    for label, wnid in enumerate(WNIDS):
        images = {}
        for number in range(train):
            images[f"{wnid}_{9 * number + 3}.JPEG"] = jpeg(*sizes[number % len(sizes)], seed=1000 * label + number)
        tree["train"][wnid] = images
    numbers = np.random.default_rng(7).permutation(val * len(WNIDS)) + 1
    for place, number in enumerate(numbers.tolist()):
        wnid = WNIDS[place % len(WNIDS)]
        tree["val"][wnid][f"ILSVRC2012_val_{number:08d}.JPEG"] = jpeg(*sizes[0], seed=90_000 + number)
    return tree


def val_images(tree: Tree) -> list[tuple[str, str, bytes]]:
    """Name, wnid and bytes, by number."""
    return sorted((name, wnid, data) for wnid, images in tree["val"].items() for name, data in images.items())


def write_class_folders(root: Path, tree: Tree, splits: Sequence[str] = ("train", "val")) -> Path:
    for split in splits:
        for wnid, images in tree[split].items():
            (root / split / wnid).mkdir(parents=True)
            for name, data in images.items():
                (root / split / wnid / name).write_bytes(data)
    return root


def write_flat_val(root: Path, tree: Tree) -> Path:
    (root / "val").mkdir(parents=True)
    for name, _, data in val_images(tree):
        (root / "val" / name).write_bytes(data)
    return root


def tar_bytes(folder: Path, files: dict[str, bytes]) -> bytes:
    path = write_tar(folder / "inner.tar", files)
    data = path.read_bytes()
    path.unlink()
    return data


def write_imagenet_tars(root: Path, tree: Tree) -> Path:
    """The two tars, without labels; the classes in another order than that of their names, as names within them."""
    root.mkdir(parents=True, exist_ok=True)
    inner = {
        f"{wnid}.tar": tar_bytes(root, dict(sorted(images.items())[::-1])) for wnid, images in tree["train"].items()
    }
    write_tar(root / "ILSVRC2012_img_train.tar", dict(sorted(inner.items())[::-1]))
    write_tar(root / "ILSVRC2012_img_val.tar", {name: data for name, _, data in val_images(tree)})
    return root


def kit_files(tree: Tree) -> dict[str, bytes]:
    """Truth and meta.mat of the development kit. Its ids are in an order of their own, and it has inner nodes too."""
    ids = {wnid: number for number, wnid in enumerate(["n02097298", "n01440764", "n03126707", "n01443537"], 1)}
    ids["n00001740"] = 1001
    kinds = [("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("num_children", "f8")]
    synsets = np.array([(id, wnid, "words", 0) for wnid, id in ids.items()], dtype=kinds).reshape(-1, 1)
    buffer = io.BytesIO()
    savemat(buffer, {"synsets": synsets}, do_compression=True)
    truth = "".join(f"{ids[wnid]}\n" for _, wnid, _ in val_images(tree))
    return {"ILSVRC2012_validation_ground_truth.txt": truth.encode(), "meta.mat": buffer.getvalue()}


def write_labels(folder: Path, tree: Tree, form: str) -> None:
    """Which class each validation image is of, in one of the forms there are."""
    pairs = [(name, wnid) for name, wnid, _ in val_images(tree)]
    kit = {f"{KIT}/data/{name}": data for name, data in kit_files(tree).items()}
    if form == "list":
        (folder / "val_labels.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid in pairs))
    elif form == "kaggle":
        lines = [f"{Path(name).stem},{wnid} 1 2 3 4 {wnid} 5 6 7 8\n" for name, wnid in pairs]
        (folder / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(lines))
    elif form == "tiny":
        (folder / "val_annotations.txt").write_text("".join(f"{name}\t{wnid}\t0\t0\t6\t6\n" for name, wnid in pairs))
    elif form == "kit":
        for name, data in kit.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    else:
        packed = gzip.compress(write_tar(folder / "kit.tar", kit).read_bytes())
        (folder / "kit.tar").unlink()
        (folder / f"{KIT}.tar.gz").write_bytes(packed)


LABEL_FORMS = ["list", "kaggle", "tiny", "kit", "archive"]


def parquet_rows(tree: Tree, split: str) -> list[tuple[str, int, bytes]]:
    """Path, label and bytes in the order of the classes; the paths as in Hugging Face's imagenet-1k."""
    return [
        (f"{Path(name).stem}_{wnid}.JPEG", WNIDS.index(wnid), data)
        for wnid, images in tree[split].items()
        for name, data in sorted(images.items())
    ]


def write_parquet(path: Path, rows: list[tuple[Any, int, Any]], names: Sequence[str] = (), group: int = 4) -> Path:
    """One file with row groups of `group` images."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": data, "path": name} for name, _, data in rows]
    image = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    table = pa.table({"image": image, "label": pa.array([label for _, label, _ in rows], pa.int64())})
    features = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    if names:
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=group)
    return path
