"""How near samples come to images that were learnt: does a small buffer, or the train set, come back?

Authenticity (Alaa et al. 2022, arXiv 2102.08921): a sample is not authentic, here "memorised", where it is nearer to
its nearest learnt image than the nearest other real image is to that one. Measured in feature space, as there, and in
pixels, where mirrored or shifted copies are missed. A share says little by itself: it grows with the number of learnt
images, and held-out real images, which nobody copied, get one as well. That is its floor, measured beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.evaluation.evaluate import Evaluator, Samples
from trainer.evaluation.features import Float32, LabelledImages
from trainer.evaluation.neighbours import nearest
from trainer.evaluation.reference import image_features

Vectors = NDArray[np.generic]


@dataclass(frozen=True)
class _Images:
    """pixels (n, C H W) uint8, features (n, d), keys (n,)."""

    pixels: NDArray[np.uint8]
    features: Float32
    keys: NDArray[np.uint64]

    @staticmethod
    def of(images: LabelledImages, features: Float32, classes: list[int]) -> _Images:
        rows = np.flatnonzero(np.isin(images.labels, classes)).astype(np.int64)
        return _Images(images.read(rows).reshape(len(rows), -1), features[rows], images.keys[rows])


def memorisation(
    evaluator: Evaluator, samples: Samples, after_task: int, learnt: LabelledImages | None = None
) -> dict[str, Any]:
    """Nearest learnt images of samples of the classes seen, as JSON values. Reads the train images of these classes.

    Args:
        learnt: images of the train split that may have been memorised, a buffer; None: all of the train split.

    Returns:
        learnt_images, samples, held_out_images: how many; and for "features" and "pixels":
        distance: the median distance of a sample to its nearest learnt image (for pixels the root of the mean square
        over pixels, in grey values of 0 ... 255); held_out_distance: that of test images of the classes seen.
        memorised: the share of samples nearer to it than any other train image of the classes seen is;
        held_out_memorised: that of the test images.
    """
    classes = evaluator.classes_seen(after_task)
    train, test = (_split(evaluator, name, classes) for name in ("train", "test"))
    kept = train if learnt is None else _Images.of(learnt, image_features(learnt, evaluator.extractor), classes)
    where = {key: row for row, key in enumerate(train.keys.tolist())}
    own = np.array([where.get(key, -1) for key in kept.keys.tolist()], dtype=np.int64)
    flat = samples.images.reshape(len(samples), -1)
    unit = 1.0 / np.sqrt(flat.shape[1])
    return {
        "learnt_images": len(own),
        "samples": len(samples),
        "held_out_images": len(test.keys),
        "features": _closeness(samples.features, test.features, kept.features, train.features, own, 1.0),
        "pixels": _closeness(flat, test.pixels, kept.pixels, train.pixels, own, unit),
    }


def _split(evaluator: Evaluator, name: str, classes: list[int]) -> _Images:
    images = evaluator.open_split(name)
    return _Images.of(images, evaluator.split_features(name, images), classes)


def _closeness(
    samples: Vectors, held_out: Vectors, kept: Vectors, real: Vectors, own: NDArray[np.int64], unit: float
) -> dict[str, float]:
    """`own` (m,): the row of each of the `kept` (m, d) among the `real`. Distances are given times `unit`."""
    distance, found = nearest(samples, kept)
    beside, beside_found = nearest(held_out, kept)
    needed = np.unique(np.concatenate([found, beside_found]))
    reach = np.full(len(kept), np.nan)
    reach[needed] = nearest(kept[needed], real, own[needed])[0]
    return {
        "distance": float(np.median(distance)) * unit,
        "held_out_distance": float(np.median(beside)) * unit,
        "memorised": float(np.mean(distance < reach[found])),
        "held_out_memorised": float(np.mean(beside < reach[beside_found])),
    }
