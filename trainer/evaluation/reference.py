"""The real side of the measures: features of the real images, computed once and cached."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from trainer.data.shards import read_index, task_directory, write_atomic
from trainer.evaluation.features import FeatureExtractor, Float32, LabelledImages

# A test split smaller than this gives a Frechet distance that is mostly scatter: the train images join it.
MIN_TEST_IMAGES = 1000
READ_AT_ONCE = 2048
TEST_ONLY, WITH_TRAIN = "test", "train+test"


@dataclass(frozen=True)
class Reference:
    """Features (N, d) and class ids (N,) of the real images that generated ones are measured against.

    `split`: "test", or "train+test" where the test split has fewer than MIN_TEST_IMAGES images in all; `id` names
    images and extractor.
    """

    split: str
    features: Float32
    labels: NDArray[np.int64]
    id: str

    def of_classes(self, classes: Sequence[int]) -> Float32:
        """Features of the images of these classes, shape (n, d)."""
        return self.features[np.isin(self.labels, classes)]


def load_reference(
    root: Path,
    tasks: int,
    extractor: FeatureExtractor,
    open_split: Callable[[str], LabelledImages],
    directory: Path,
) -> Reference:
    """The reference of a built data set, all its tasks. For one process only.

    Args:
        root: the data set; its indices say which cached features are still right.
        tasks: number of tasks.
        open_split: gives the images of "train" and "test" over all tasks.
        directory: where features are cached (`<data root>/evaluator`).
    """
    test = open_split("test")
    split = TEST_ONLY if len(test) >= MIN_TEST_IMAGES else WITH_TRAIN
    parts = [(name, test if name == "test" else open_split(name)) for name in split.split("+")]
    features = [split_features(root, name, tasks, extractor, images, directory) for name, images in parts]
    labels = np.concatenate([images.labels for _, images in parts])
    return Reference(
        split, np.concatenate(features), labels, "-".join(_key(root, name, tasks, extractor) for name, _ in parts)
    )


def split_features(
    root: Path, split: str, tasks: int, extractor: FeatureExtractor, images: LabelledImages, directory: Path
) -> Float32:
    """Features (N, d) of all images of a split over all tasks, from the cache where they are there."""
    path = directory / f"reference-{_key(root, split, tasks, extractor)}.safetensors"
    return _cached_features(path, images, extractor)


def image_features(images: LabelledImages, extractor: FeatureExtractor) -> Float32:
    """Features (N, d) of all images, read a part at a time."""
    indices = np.arange(len(images), dtype=np.int64)
    parts = [
        extractor.features(images.read(indices[start : start + READ_AT_ONCE]))
        for start in range(0, len(indices), READ_AT_ONCE)
    ]
    return np.concatenate(parts)


def _key(root: Path, split: str, tasks: int, extractor: FeatureExtractor) -> str:
    digest = hashlib.sha256(f"{extractor.id}/{split}".encode())
    for task in range(1, tasks + 1):
        for shard in read_index(task_directory(root, split, task)).shards:
            digest.update(shard.sha256.encode())
    return digest.hexdigest()[:16]


def _cached_features(path: Path, images: LabelledImages, extractor: FeatureExtractor) -> Float32:
    try:
        features = load_safetensors(path.read_bytes())["features"]
        if len(features) == len(images):
            return features
    except (OSError, SafetensorError, KeyError):
        pass  # not there, or cut short: a cache is made again
    features = image_features(images, extractor)
    write_atomic(path, save_safetensors({"features": features}))
    return features
