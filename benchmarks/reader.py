"""How many images one core reads and decodes per second, by format and size.

    python benchmarks/reader.py [--json FILE] [--images FILE.npz] [--count 4000] [--seconds 2]

Reads in the global order through `RealStream` with one worker, from a warm page cache. `--images` takes real images
(uint8 `images` (N,H,W,3)); without it they are smooth random fields with some noise, which compress about as photos.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.images import encode_image
from trainer.data.shards import DatasetCard, Sample, SplitIndex, task_directory, write_card, write_index, write_shard
from trainer.data.stream import RealStream

BATCH = 128
SHARD = 1000


def smooth_images(count: int, size: int) -> NDArray[np.uint8]:
    """Random fields (count, size, size, 3) with most of their energy at low frequencies, as photographs have."""
    random = np.random.default_rng(0)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for row in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        images[row] = np.clip(field + random.normal(0, 6, field.shape), 0, 255)
    return images


def load_images(path: str, count: int, size: int) -> NDArray[np.uint8]:
    """Real images, brought to the size."""
    with np.load(path, allow_pickle=False) as archive:
        images = archive["images"][:count]
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


def encode(image_HWC: NDArray[np.uint8], format: str) -> tuple[str, bytes]:
    """One member; JPEG at quality 90, which `data_tools` does not write but the reader reads."""
    if format != "jpeg":
        return encode_image(image_HWC, format)
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=90)
    return "jpg", buffer.getvalue()


def write_dataset(root: Path, images: NDArray[np.uint8], format: str) -> float:
    """One task of one class; returns the mean bytes of an image's member."""
    directory, size = task_directory(root, "train", 1), images.shape[1]
    members = [encode(image, format) for image in images]
    shards = []
    for start in range(0, len(images), SHARD):
        part = members[start : start + SHARD]
        samples = [Sample(f"train-{start + i:06d}", {e: data, "cls": b"0"}) for i, (e, data) in enumerate(part)]
        shards.append(write_shard(directory / f"{len(shards):05d}.tar", samples, [0] * len(part)))
    write_index(directory, SplitIndex("benchmark", "train", 1, size, 3, format, [0], shards))
    write_card(root, DatasetCard("benchmark", size, 3, format, ["0"], [[0]]))
    return sum(len(data) for _, data in members) / len(members)


def measure(data: TaskData, seconds: float) -> tuple[float, float]:
    """Images per second of wall time and of CPU time (of all threads: what one core does when nothing else runs).

    Over at least `seconds` of wall time, after a first batch that warms everything up.
    """
    options: dict[str, Any] = {"seed": 0, "task": 1, "global_batch": BATCH, "rank": 0, "world_size": 1}
    with RealStream(data, **options, start_step=0, stop_step=10**9, workers=1, prefetch=4) as stream:
        next(stream)
        began, cpu, images = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < seconds:
            images += len(next(stream))
        return images / (time.perf_counter() - began), images / (time.process_time() - cpu)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per size and format."""
    rows: list[dict[str, Any]] = []
    for size in (32, 64):
        images = (
            load_images(options.images, options.count, size) if options.images else smooth_images(options.count, size)
        )
        for format in ("png", "jpeg", "raw"):
            with tempfile.TemporaryDirectory() as directory:
                stored = write_dataset(Path(directory), images, format)
                data = TaskData.open(Path(directory), "train", [1], Verify.size)
                wall, cpu = measure(data, options.seconds)
            row = {"size": size, "format": format, "bytes": round(stored)}
            rows.append({**row, "images_per_second": round(wall), "images_per_cpu_second": round(cpu)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    parser.add_argument("--images", help="an .npz of real images")
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seconds", type=float, default=2.0)
    options = parser.parse_args()
    rows = run(options)
    table = Table("size", "format", "bytes/image", "images/s", "per CPU s", title="reading, one worker")
    for row in rows:
        numbers = (row[key] for key in ("bytes", "images_per_second", "images_per_cpu_second"))
        table.add_row(f"{row['size']}x{row['size']}x3", row["format"], *map(str, numbers))
    Console().print(table)
    if options.json:
        machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        versions = {name: version(name) for name in ("numpy", "pillow", "torch")}
        result = {"command": " ".join(sys.argv), "machine": machine, "python": platform.python_version()}
        options.json.write_text(json.dumps({**result, "versions": versions, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
