"""Views of uint8 images on their device: each a function of its own seed, whatever batch the image is in.

A weak view is mirrored and cropped, a strong one also distorted by RandAugment (Cubuk et al. 2020, arXiv 1909.13719).
What is done to which image is drawn on the host, so that nothing waits for the device; the magnitude is the same for
all, so the images that an operation falls on go through it together. The operations are torchvision's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample
from torchvision.transforms.v2 import InterpolationMode, RandAugment

from trainer.seeds import derive

BINS = 31  # magnitudes, 0 to 30
RATIO = 4 / 3  # of a crop's sides, at most, either way
Seeds = NDArray[np.int64]


@dataclass(frozen=True)
class Augmentation:
    """`flip`: mirror half of the images. `crop`: least share of the area that a view shows; 1: all of it. `operations`
    of RandAugment, at `magnitude` of 0 to 30, make a view a strong one; 0: it stays a weak one."""

    flip: bool
    crop: float
    operations: int
    magnitude: int


def weak_views(images: Tensor, seeds: Seeds, augmentation: Augmentation) -> Tensor:
    """Mirrored and cropped images, uint8 (B, C, H, W) as `images`; seeds (B,) int64 on the host."""
    flipped = _uniform(seeds, "flip") < 0.5 if augmentation.flip else np.zeros(len(seeds), dtype=bool)
    if augmentation.crop == 1.0:
        mirrored = _on(flipped, images.device)[:, None, None, None]
        return torch.where(mirrored, images.flip(-1), images) if augmentation.flip else images
    height, width, top, left = crops(seeds, augmentation.crop)
    # Coordinates run from -1 to 1; x' = s x + m, mirrored where the scale is negative.
    scale_x, scale_y = np.where(flipped, -width, width), height
    theta = np.zeros((len(seeds), 2, 3), dtype=np.float32)
    theta[:, 0, 0], theta[:, 0, 2] = scale_x, 2 * left + width - 1
    theta[:, 1, 1], theta[:, 1, 2] = scale_y, 2 * top + height - 1
    grid = affine_grid(_on(theta, images.device), list(images.shape), align_corners=False)
    shown = grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return shown.round().clamp(0, 255).to(torch.uint8)


def strong_views(images: Tensor, seeds: Seeds, augmentation: Augmentation) -> Tensor:
    """Weak views after RandAugment, uint8 (B, C, H, W) as `images`; what moves into a picture is black."""
    views = weak_views(images, seeds, augmentation)
    for number in range(augmentation.operations):
        views = _distort(views, seeds, number, augmentation.magnitude)
    return views


def crops(seeds: Seeds, least: float) -> tuple[NDArray[np.float64], ...]:
    """Height, width, top and left of crops as shares of an image's sides, (B,) each, as torchvision's
    RandomResizedCrop draws them: area uniform in [least, 1], the logarithm of the sides' ratio uniform up to RATIO;
    a side that would be longer than the image is as long."""
    area = least + (1 - least) * _uniform(seeds, "area")
    ratio = np.exp((2 * _uniform(seeds, "ratio") - 1) * math.log(RATIO))
    height, width = np.minimum(np.sqrt(area / ratio), 1.0), np.minimum(np.sqrt(area * ratio), 1.0)
    return height, width, _uniform(seeds, "top") * (1 - height), _uniform(seeds, "left") * (1 - width)


def drawn_operations(seeds: Seeds, number: int, names: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which of the operations falls on each image as its `number`-th, and whether its magnitude is negative, (B,)."""
    chosen = (_uniform(seeds, f"operation-{number}") * names).astype(np.int64)
    return chosen, _uniform(seeds, f"sign-{number}") < 0.5


def _distort(images: Tensor, seeds: Seeds, number: int, magnitude: int) -> Tensor:
    """Each image through an operation of its own."""
    library = RandAugment(magnitude=magnitude, num_magnitude_bins=BINS, interpolation=InterpolationMode.BILINEAR)
    space = library._AUGMENTATION_SPACE
    height, width = images.shape[-2:]
    chosen, negative = drawn_operations(seeds, number, len(space))
    out = images.clone()
    for rows, name, sign in _groups(chosen, negative, list(space)):
        magnitudes, signed = space[name]
        values = magnitudes(BINS, height, width)
        value = 0.0 if values is None else float(values[magnitude])
        index = _on(rows, images.device)
        value = sign * value if signed else value
        fill = library._fill
        distorted: Any = library._apply_image_or_video_transform(
            images[index], name, value, library.interpolation, fill
        )
        out[index] = distorted
    return out


def _groups(
    chosen: NDArray[np.int64], negative: NDArray[np.bool_], names: list[str]
) -> Iterator[tuple[NDArray[np.int64], str, float]]:
    for operation, name in enumerate(names):
        for sign in (1.0, -1.0):
            rows = np.flatnonzero((chosen == operation) & (negative == (sign < 0)))
            if len(rows):
                yield rows, name, sign


def _uniform(seeds: Seeds, what: str) -> NDArray[np.float64]:
    """In [0, 1), (B,): another for each use of a seed."""
    mixed = derive(0, f"augment/{what}", seeds.view(np.uint64)).view(np.uint64)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _on(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
