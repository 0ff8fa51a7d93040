"""How fast ImageNet-100 becomes task shards, from each of the three forms in which people have it.

    python benchmarks/prepare.py [--parts shape,rate] [--forms folder,imagenet,parquet] [--per-class 1300]
                                 [--tiny FOLDER] [--json FILE] [--quick] [--workers N]

The images are synthetic: windows of a random field with noise, as JPEGs. The tree (`shape`) has ImageNet-100's shape:
the 100 listed classes, and 10 others to be passed over, with 1,300 training and 50 validation images each, as class
folders, as the official tar of tars, and as parquet files. These images are small (66 to 96 pixels), and kept raw. The
rate for images of the size of ImageNet's (500x375, `rate`) is taken of fewer of them. `--tiny` adds real ones: a folder
with train.npz and val.npz of JPEGs of 64x64 one after another (`jpeg`, `offsets`, `labels`, `files`, `wnids`).

Seconds are counted twice: on the clock, and of CPU time of all processes together. A machine that does other things
besides lengthens the first, and hardly the second. Files come from a warm page cache.

Before anything counts, every data set is verified; the shards of folders and tars must be the same bytes, those of
parquet hold the same images, and some images are compared with what Pillow alone makes of the raw files.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from claims import Report, WrongResult, command_line, fail, package_versions
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from data_tools.build import build
from data_tools.crew import cores
from data_tools.spec import BuildSpec
from data_tools.verify import verify
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.shards import read_index
from trainer.data.tasks import split_classes

LIST = Path(__file__).resolve().parents[1] / "configs" / "imagenet100_classes.txt"
PARTS = ("shape", "rate")
FORMS = ("folder", "imagenet", "parquet")
OTHERS = 10  # classes that are not listed
ROWS, GROUP = 10_000, 100  # images of a parquet file and of its row groups
FIELD = 2048  # edge of the random field
COMPARED = 40  # images of a data set that are made by Pillow alone, too
Image_HWC = NDArray[np.uint8]
Contents = Counter[tuple[str, int, str]]  # split, class id and checksum of the images of a data set


@dataclass(frozen=True)
class Sizes:
    train: int = 1300
    val: int = 50
    classes: int = 100
    large: int = 150  # images of 500x375, of each of four classes


QUICK = Sizes(train=6, val=2, classes=10, large=4)


class Pictures:
    """JPEGs that are all different: windows of one field. `noise` sets how well they compress."""

    def __init__(self, seed: int, noise: float) -> None:
        random = np.random.default_rng(seed)
        coarse = Image.fromarray(random.integers(0, 256, (FIELD // 64, FIELD // 64, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((FIELD, FIELD), Image.Resampling.BICUBIC), dtype=np.float32)
        grain = random.normal(0, noise, (FIELD, FIELD, 1)).astype(np.float32)
        self._field = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        self._random = random

    def jpeg(self, width: int, height: int) -> bytes:
        left, top = (int(self._random.integers(FIELD - edge)) for edge in (width, height))
        buffer = io.BytesIO()
        Image.fromarray(self._field[top : top + height, left : left + width]).save(buffer, "JPEG", quality=92)
        return buffer.getvalue()

    def small(self) -> bytes:
        return self.jpeg(*self._random.integers(66, 97, 2).tolist())


# --- raw files ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """Raw images by split and class; validation images are named by number, over all classes."""

    train: dict[str, dict[str, bytes]]
    val: dict[str, dict[str, bytes]]
    listed: list[str]

    @property
    def parts(self) -> tuple[tuple[str, dict[str, dict[str, bytes]]], ...]:
        return ("train", self.train), ("val", self.val)

    @property
    def counted(self) -> list[bytes]:
        """The images of listed classes."""
        return [data for _, part in self.parts for wnid in self.listed for data in part[wnid].values()]


def make_raw(sizes: Sizes, seed: int) -> Raw:
    """Small images in the shape of ImageNet-100."""
    listed = LIST.read_text().split()[: sizes.classes]
    others = [f"n9{number:07d}" for number in range(OTHERS)]
    pictures = Pictures(seed, noise=12)
    train = {
        wnid: {f"{wnid}_{number}.JPEG": pictures.small() for number in range(sizes.train)}
        for wnid in sorted(listed + others)
    }
    order = np.random.default_rng(seed).permutation(sizes.val * len(train)) + 1
    val: dict[str, dict[str, bytes]] = {wnid: {} for wnid in train}
    for place, number in enumerate(order.tolist()):
        val[list(train)[place % len(train)]][f"ILSVRC2012_val_{number:08d}.JPEG"] = pictures.small()
    return Raw(train, val, listed)


def make_large(sizes: Sizes, seed: int) -> Raw:
    """A few images as large as ImageNet's."""
    listed = LIST.read_text().split()[:4]
    pictures = Pictures(seed, noise=18)
    parts = [
        {wnid: {f"{wnid}_{number}.JPEG": pictures.jpeg(500, 375) for number in range(count)} for wnid in listed}
        for count in (sizes.large, 1)
    ]
    return Raw(parts[0], parts[1], listed)


def read_tiny(folder: Path) -> Raw:
    """Real images from two .npz files."""
    parts: list[dict[str, dict[str, bytes]]] = []
    for name in ("train", "val"):
        with np.load(folder / f"{name}.npz", allow_pickle=False) as archive:
            jpeg, offsets, labels, files = (archive[key] for key in ("jpeg", "offsets", "labels", "files"))
            wnids = [str(wnid) for wnid in archive["wnids"]]
        part: dict[str, dict[str, bytes]] = {wnid: {} for wnid in wnids}
        for row, label in enumerate(labels.tolist()):
            part[wnids[label]][str(files[row])] = jpeg[offsets[row] : offsets[row + 1]].tobytes()
        parts.append(part)
    return Raw(parts[0], parts[1], list(parts[0]))


def write_raw(form: str, raw: Raw, root: Path) -> Path:
    {"folder": write_folder, "imagenet": write_tars, "parquet": write_parquet}[form](raw, root)
    return root


def write_folder(raw: Raw, root: Path) -> None:
    for split, part in raw.parts:
        for wnid, images in part.items():
            folder = root / split / wnid
            folder.mkdir(parents=True)
            for name, data in images.items():
                (folder / name).write_bytes(data)


def write_tars(raw: Raw, root: Path) -> None:
    """The two official tars, and a list of labels."""
    root.mkdir(parents=True)
    with tarfile.open(root / "ILSVRC2012_img_train.tar", "w") as outer:
        for wnid, images in raw.train.items():
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for name, data in images.items():
                    add_member(inner, name, data)
            add_member(outer, f"{wnid}.tar", buffer.getvalue())
    images = sorted((name, wnid, data) for wnid, part in raw.val.items() for name, data in part.items())
    with tarfile.open(root / "ILSVRC2012_img_val.tar", "w") as tar:
        for name, _, data in images:
            add_member(tar, name, data)
    (root / "val_labels.txt").write_text("".join(f"{name} {wnid}\n" for name, wnid, _ in images))


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def write_parquet(raw: Raw, root: Path) -> None:
    """Rows shuffled over all classes, as in Hugging Face's imagenet-1k, whose paths end in the wnid."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True)
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for split, part in zip(("train", "validation"), (raw.train, raw.val), strict=True):
        rows = [
            (label, {"bytes": data, "path": f"{Path(name).stem}_{wnid}.JPEG"})
            for label, (wnid, images) in enumerate(part.items())
            for name, data in images.items()
        ]
        order = np.random.default_rng(0).permutation(len(rows)).tolist()
        for number, first in enumerate(range(0, len(rows), ROWS)):
            chunk = [rows[row] for row in order[first : first + ROWS]]
            columns = {"image": pa.array([cell for _, cell in chunk], image), "label": [label for label, _ in chunk]}
            pq.write_table(pa.table(columns), root / f"{split}-{number:05d}.parquet", row_group_size=GROUP)


# --- what is right -----------------------------------------------------------------------------------------------


def by_pillow(data: bytes, size: int) -> Image_HWC:
    """The rule of `data_tools`, without it: shorter side to `size` by the bicubic filter, then the centre."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    shorter = min(image.size)
    image = image.resize(
        (round(image.width * size / shorter), round(image.height * size / shorter)), Image.Resampling.BICUBIC
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def contents(root: Path, tasks: int) -> Contents:
    found: Contents = Counter()
    for split in ("train", "test"):
        data = TaskData.open(root, split, list(range(1, tasks + 1)), Verify.size)
        for first in range(0, len(data), 1000):
            rows = np.arange(first, min(first + 1000, len(data)))
            images, labels = data.read(rows), data.labels[rows]
            for image, label in zip(images, labels.tolist(), strict=True):
                found[split, label, hashlib.sha256(image.tobytes()).hexdigest()] += 1
    return found


def check(root: Path, raw: Raw, spec: BuildSpec, known: Contents | None) -> Contents:
    """The images of a data set. Raises WrongResult where they are not those of the raw files."""
    found = contents(root, len(spec.tasks))
    if known is not None and found != known:
        raise WrongResult(f"{spec.source}: holds other images than the form before")
    if found.total() != len(raw.counted):
        raise WrongResult(f"{spec.source}: {found.total()} images, {len(raw.counted)} expected")
    random = np.random.default_rng(1)
    for split, part in raw.parts:
        for label in random.integers(len(raw.listed), size=COMPARED // 2).tolist():
            images = list(part[raw.listed[label]].values())
            image = by_pillow(images[int(random.integers(len(images)))], spec.image_size).transpose(2, 0, 1)
            key = ("train" if split == "train" else "test", label, hashlib.sha256(image.tobytes()).hexdigest())
            if key not in found:
                raise WrongResult(f"{spec.source}: an image of {raw.listed[label]} is not what Pillow makes of it")
    return found


def checksums(root: Path) -> list[str]:
    """Of all shards."""
    return [entry.sha256 for path in sorted(root.glob("*/task-*")) for entry in read_index(path).shards]


# --- measuring ---------------------------------------------------------------------------------------------------


class Clock:
    """Seconds on the clock, and of CPU time of this process and those it has waited for."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), self._now()

    def read(self, images: int) -> dict[str, float]:
        seconds, cpu = time.perf_counter() - self._began, self._now() - self._cpu
        return {
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu, 2),
            "images_per_second": round(images / seconds, 1),
            "images_per_cpu_second": round(images / cpu, 1),
            "cpu_ms_per_image": round(1000 * cpu / images, 4),
        }

    @staticmethod
    def _now() -> float:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(part.ru_utime + part.ru_stime for part in usage)


def measure(spec: BuildSpec, raw: Raw, root: Path, workers: int) -> dict[str, Any]:
    """Build and verify one data set. Raises WrongResult where it is not sound."""
    images = len(raw.counted)
    clock = Clock()
    build(spec, root, progress=True, workers=workers)
    result: dict[str, Any] = {"images": images, "workers": workers, "build": clock.read(images)}
    clock = Clock()
    report = verify(root, workers, progress=True)
    if report.damage:
        raise WrongResult(report.damage[0])
    result["verify"] = clock.read(images)
    result["raw_bytes_per_image"] = round(sum(map(len, raw.counted)) / images)
    result["shard_bytes_per_image"] = round(sum(row.bytes for row in report.rows) / images)
    return result


def spec_of(raw: Raw, form: str, source: Path, work: Path, size: int, per_task: int) -> BuildSpec:
    listed = work / "classes.txt"
    listed.write_text("\n".join(raw.listed) + "\n")
    tasks = split_classes(len(raw.listed), per_task, 0)
    return BuildSpec("imagenet100", form, tasks, size, 3, source_path=str(source), class_list=str(listed))


def shape(raw: Raw, work: Path, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """The tree of the real shape in each form."""
    known: Contents | None = None
    first: list[str] = []
    for form in options.forms:
        clock = Clock()
        source = write_raw(form, raw, work / f"raw-{form}")
        written = clock.read(len(raw.counted))["seconds"]
        spec = replace(spec_of(raw, form, source, work, 64, len(raw.listed) // 10), format="raw")
        result = measure(spec, raw, work / form, options.workers) | {"raw_written_in_seconds": written}
        same = checksums(work / form) == first
        if not same:
            known = check(work / form, raw, spec, known)
        if first:
            result["same_shards_as"] = options.forms[0] if same else "none, the same images"
        if first and not same and "parquet" not in (form, options.forms[0]):
            raise WrongResult(f"{form}: other shards than those of {options.forms[0]}")
        first = first or checksums(work / form)
        for folder in (source, work / form):
            shutil.rmtree(folder)
        yield form, result


def rates(raw: Raw, work: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Images as large as ImageNet's, by one process."""
    source = write_raw("folder", raw, work / "raw-large")
    for size in (64, 256):
        spec = spec_of(raw, "folder", source, work, size, 2)
        for format in ("png", "raw"):
            spec = replace(spec, format=format)
            root = work / f"large-{size}-{format}"
            result = measure(spec, raw, root, 1)
            check(root, raw, spec, None)
            shutil.rmtree(root)
            yield f"{size}, {format}", result
    shutil.rmtree(source)


def real(raw: Raw, work: Path, workers: int) -> dict[str, Any]:
    source = write_raw("folder", raw, work / "raw-tiny")
    spec = spec_of(raw, "folder", source, work, 64, len(raw.listed) // 10)
    result = measure(spec, raw, work / "tiny", workers)
    result["per_class"] = {split: len(part[raw.listed[0]]) for split, part in raw.parts}
    return result


def print_results(details: dict[str, Any], title: str) -> None:
    table = Table(
        "data", "images", "processes", "build: s", "CPU s", "images/s/core", "verify: images/s/core", title=title
    )
    rows = {f"{form}, small": result for form, result in details["shape"].items()}
    rows |= {f"500x375 to {name}": result for name, result in details["rate"].items()}
    rows |= {"Tiny-ImageNet": details["tiny"]} if "tiny" in details else {}
    for name, result in rows.items():
        built, verified = result["build"], result["verify"]
        numbers = [
            built["seconds"],
            built["cpu_seconds"],
            built["images_per_cpu_second"],
            verified["images_per_cpu_second"],
        ]
        table.add_row(name, str(result["images"]), str(result["workers"]), *(f"{number:,.1f}" for number in numbers))
    Console(width=132).print(table)


def run(options: argparse.Namespace, report: Report, work: Path) -> None:
    """Everything, one after another; what is done is written at once. Raises WrongResult."""
    sizes = QUICK if options.quick else Sizes(train=options.per_class)
    details = report.details
    details["synthetic"] = (
        "all but 'tiny': windows of a random field with noise, JPEG quality 92; 'shape' of 66 to 96 pixels, 'rate' of "
        "500x375. The file tree, names, tars and parquet files have the form of the real ones."
    )
    details |= {
        "workers": options.workers,
        "load_average": [round(os.getloadavg()[0], 1)],
        "rate": {},
        "shape": {},
    }
    if "rate" in options.parts:
        for name, result in rates(make_large(sizes, options.seed), work):
            details["rate"][name] = result
            report.write()
    if options.tiny:
        details["tiny"] = real(read_tiny(options.tiny), work, options.workers)
        report.write()
    if "shape" in options.parts:
        for form, result in shape(make_raw(sizes, options.seed), work, options):
            details["shape"][form] = result
            report.write()
    details["load_average"].append(round(os.getloadavg()[0], 1))
    report.write()


def _some_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def read(text: str) -> tuple[str, ...]:
        parts = tuple(text.split(","))
        if not set(parts) <= {*known, "none"}:
            raise argparse.ArgumentTypeError(f"{text}: of {', '.join(known)}, or none")
        return parts

    return read


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=_some_of(PARTS), default=PARTS, metavar="NAMES", help="of shape,rate")
    parser.add_argument("--forms", type=_some_of(FORMS), default=FORMS, metavar="NAMES", help="of the shape")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="a few images: whether everything runs")
    parser.add_argument("--per-class", type=int, default=Sizes.train, help="training images of each class")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; by default the cores")
    parser.add_argument("--tiny", type=Path, metavar="FOLDER", help="real images: train.npz and val.npz of JPEGs")
    parser.add_argument("--work", type=Path, help="where the files go for the time; by default a temporary folder")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    report = Report(command_line("prepare.py", argv), options.json, cuda=False)
    report.versions = package_versions(("numpy", "pillow", "pyarrow"))
    with tempfile.TemporaryDirectory(prefix="palimpsest-prepare-", dir=options.work) as directory:
        try:
            run(options, report, Path(directory))
        except WrongResult as error:
            fail(error)
    print_results(report.details, report.hardware)
    if not options.json:
        print(json.dumps(report.details, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
