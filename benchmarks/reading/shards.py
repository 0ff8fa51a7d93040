"""Shards of images and of replay points to read, and the same read by hand."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.config import Config, Points, Verify
from trainer.data.dataset import TaskData
from trainer.data.images import encode_image
from trainer.data.shards import DatasetCard, Sample, SplitIndex, task_directory, write_card, write_index, write_shard
from trainer.replay.decode import shard_name
from trainer.replay.draws import locate
from trainer.replay.points import StoredPoints
from trainer.replay.pool import encode
from trainer.replay.reader import Offer
from trainer.replay.request import ReplayRequest, plan_request
from trainer.replay.trajectory import TrajectoryBatch

SHARD = 50  # images: few, so that a batch is gathered from many files, as of a large data set
EXTENSIONS = {"png": "png", "jpeg": "jpg", "raw": "npy"}
CLASSES = 50


def smooth_images(count: int, size: int, seed: int) -> NDArray[np.uint8]:
    """Random fields (count, size, size, 3) with most of their energy at low frequencies, as photographs have."""
    random = np.random.default_rng(seed)
    images = np.empty((count, size, size, 3), dtype=np.uint8)
    for row in range(count):
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        field = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
        images[row] = np.clip(field + random.normal(0, 6, field.shape), 0, 255)
    return images


def load_images(path: str, count: int, size: int) -> NDArray[np.uint8]:
    """Real images (uint8 `images` (N,H,W,3) of an .npz), brought to the size."""
    with np.load(path, allow_pickle=False) as archive:
        images = archive["images"][:count]
    resized = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image) for image in resized])


@dataclass(frozen=True)
class ImageShards:
    """One task of one class in one format."""

    format: str
    data: TaskData
    paths: list[str]
    member_bytes: float  # mean, of an image
    disk_bytes: float  # of a tar, per image


def _encode(image_HWC: NDArray[np.uint8], format: str) -> tuple[str, bytes]:
    """One member; JPEG at quality 90, which `data_tools` does not write but the reader reads."""
    if format != "jpeg":
        return encode_image(image_HWC, format)
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=90)
    return "jpg", buffer.getvalue()


def write_images(root: Path, images: NDArray[np.uint8], format: str) -> ImageShards:
    """A data set of all images."""
    directory, size = task_directory(root, "train", 1), images.shape[1]
    members = [_encode(image, format) for image in images]
    shards = []
    for start in range(0, len(images), SHARD):
        part = members[start : start + SHARD]
        samples = [Sample(f"train-{start + i:06d}", {e: data, "cls": b"0"}) for i, (e, data) in enumerate(part)]
        shards.append(write_shard(directory / f"{len(shards):05d}.tar", samples, [0] * len(part)))
    write_index(directory, SplitIndex("benchmark", "train", 1, size, 3, format, [0], shards))
    write_card(root, DatasetCard("benchmark", size, 3, format, ["0"], [[0]]))
    return ImageShards(
        format,
        TaskData.open(root, "train", [1], Verify.size),
        [str(directory / entry.name) for entry in shards],
        sum(len(data) for _, data in members) / len(members),
        sum(entry.bytes for entry in shards) / len(members),
    )


def images_by_hand(shards: ImageShards) -> dict[int, NDArray[np.uint8]]:
    """Images (C,H,W) by the hash of their key, by tarfile, numpy and Pillow alone."""
    data, found = shards.data, dict[int, NDArray[np.uint8]]()
    ids = dict(zip(data.sample_keys, data.keys.tolist(), strict=True))
    for path in shards.paths:
        with tarfile.open(path) as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                if extension == EXTENSIONS[shards.format]:
                    file: Any = tar.extractfile(info)
                    content = io.BytesIO(file.read())
                    raw = extension == "npy"
                    found[ids[key]] = (
                        np.load(content, allow_pickle=False)
                        if raw
                        else np.asarray(Image.open(content)).transpose(2, 0, 1)
                    )
    return found


@dataclass(frozen=True)
class ReplayShards:
    """The first shards of a pool, all of whose points are used once, in steps of `batch`."""

    request: ReplayRequest
    directory: Path
    offers: list[Offer]
    batch: int

    @property
    def paths(self) -> list[str]:
        return [str(self.directory / shard_name(offer.shard)) for offer in self.offers]

    @property
    def steps(self) -> int:
        return len(self.offers) * self.request.shard_points // self.batch

    def positions(self, step: int) -> NDArray[np.int64]:
        return np.arange(step * self.batch, (step + 1) * self.batch, dtype=np.int64)


def write_replay(
    directory: Path, points: Points, size: int, *, trajectories: int, shards: int, batch: int, seed: int
) -> ReplayShards:
    """Shards of random numbers: trajectories of 10 points with the teacher's targets, in fp16."""
    config = Config()
    config.data.image_size, config.data.channels, config.model.max_classes = size, 3, CLASSES
    config.replay.points, config.replay.points_per_trajectory = points, 10
    config.replay.shard_trajectories, config.replay.steps = trajectories, 11
    request = plan_request(config, 2, list(range(CLASSES)), 10**6)
    directory.mkdir(parents=True)
    offers = []
    for shard in range(shards):
        entry, data = encode(request, shard, [_random_trajectories(request, shard, seed)])
        (directory / entry.name).write_bytes(data)
        offers.append(Offer(shard, entry.bytes, entry.crc32, shard))
    return ReplayShards(request, directory, offers, batch)


def _random_trajectories(request: ReplayRequest, shard: int, seed: int) -> TrajectoryBatch:
    random = torch.Generator().manual_seed(seed + shard)
    count, points, shape = request.shard_trajectories, request.points_per_trajectory, request.image_shape
    whole = (count, points, *shape)
    return TrajectoryBatch(
        indices=np.arange(shard * count, (shard + 1) * count),
        label=torch.randint(0, CLASSES, (count,), generator=random),
        start_seeds=torch.randint(-(2**62), 2**62, (count,), generator=random),
        t=torch.randint(0, request.timesteps, (count, points), generator=random),
        seeds=torch.randint(-(2**62), 2**62, (count, points), generator=random),
        end=torch.randn((count, *shape), generator=random).half() if request.renoised_points else None,
        states=_states(request, random) if request.path_points else None,
        targets=torch.randn(whole, generator=random).half(),
        evaluations=0,
    )


def _states(request: ReplayRequest, random: torch.Generator) -> torch.Tensor:
    shape = (request.shard_trajectories, request.path_points, *request.image_shape)
    return torch.randn(shape, generator=random).half()


class PointsByHand:
    """The same points, by tarfile, json and numpy alone."""

    def __init__(self, shards: ReplayShards) -> None:
        self.request = shards.request
        self.records: list[dict[str, Any]] = []
        self.arrays: dict[str, list[Any]] = {}
        for path in shards.paths:
            with tarfile.open(path) as tar:
                for info in tar:
                    _, _, name = info.name.partition(".")
                    file: Any = tar.extractfile(info)
                    content = file.read()
                    if name == "json":
                        self.records.append(json.loads(content))
                    else:
                        array = np.load(io.BytesIO(content), allow_pickle=False)
                        self.arrays.setdefault(name, []).append(array)

    def agree(self, positions: NDArray[np.int64], stored: StoredPoints) -> bool:
        """Whether `stored` are the points of these positions."""
        _, trajectories, points = locate(self.request, positions)
        assert stored.images is not None and stored.targets is not None
        for row, (trajectory, point) in enumerate(zip(trajectories.tolist(), points.tolist(), strict=True)):
            record = self.records[trajectory]
            numbers = [record["label"], record["timesteps"][point], record["seeds"][point]]
            if numbers != [int(part[row]) for part in (stored.label, stored.t, stored.seeds)]:
                return False
            on_path = point < self.request.path_points
            image = self.arrays["states.npy"][trajectory][point] if on_path else self.arrays["end.npy"][trajectory]
            target = self.arrays["targets.npy"][trajectory][point]
            if not np.array_equal(stored.images[row].numpy(), image):
                return False
            if not np.array_equal(stored.targets[row].numpy(), target):
                return False
        return True
