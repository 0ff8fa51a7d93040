"""Views of uint8 images on their device: each a function of its own seed, whatever batch the image is in.

A weak view is cropped and mirrored, a strong one then distorted by RandAugment (Cubuk et al. 2020, arXiv 1909.13719),
both as torchvision has them. What is done to which image is drawn on the host, so that nothing waits for the device;
the magnitude is the same for all, so the images that an operation falls on go through it together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample
from torchvision.transforms.v2 import functional as library

from trainer.seeds import derive

BINS = 31  # magnitudes, 0 to 30
RATIO = 4 / 3  # of a crop's sides, at most, either way
TRIES = 10  # to draw a crop that lies within the image
Seeds = NDArray[np.int64]
Operation = Callable[[Tensor], Tensor]
Amount = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Augmentation:
    """`flip`: mirror half of the images. `crop`: least share of the area that a view shows; 1: all of it. `operations`
    of RandAugment, at `magnitude` of 0 to 30, make a view a strong one; 0: it stays a weak one."""

    flip: bool
    crop: float
    operations: int
    magnitude: int


def weak_views(images: Tensor, seeds: Seeds, augmentation: Augmentation) -> Tensor:
    """Cropped and mirrored images, uint8 (B, C, S, S) as `images`; seeds (B,) int64 on the host."""
    assert images.dtype == torch.uint8 and images.shape[2] == images.shape[3] and len(images) == len(seeds)
    if augmentation.crop < 1:
        images = resized_crops(images, crop_boxes(seeds, augmentation.crop, images.shape[-1]))
    if augmentation.flip:
        mirrored = _on(_uniform(seeds, "flip") < 0.5, images.device)[:, None, None, None]
        images = torch.where(mirrored, images.flip(-1), images)
    return images


def strong_views(images: Tensor, seeds: Seeds, augmentation: Augmentation) -> Tensor:
    """The weak views of the same seeds after RandAugment, uint8 (B, C, S, S) as `images`.

    What moves into a picture is black: torchvision's choice, and what digits have around them anyway.
    """
    views = weak_views(images, seeds, augmentation)
    operations = randaugment_operations(augmentation.magnitude, images.shape[-1], images.device)
    for number in range(augmentation.operations):
        chosen, negative = drawn_operations(seeds, number, len(operations))
        views = _distort(views, operations, chosen, negative)
    return views


def crop_boxes(seeds: Seeds, least: float, size: int) -> NDArray[np.int64]:
    """Top, left, height and width of crops in pixels, (B, 4), drawn as by torchvision's RandomResizedCrop.

    The share of the area is uniform in [least, 1], the logarithm of the ratio of the sides uniform up to RATIO either
    way; where that is no part of the image, both are drawn again, and after TRIES the crop is the whole image.
    """
    tries = np.arange(TRIES, dtype=np.uint64)
    area = size * size * (least + (1 - least) * _uniform(seeds[:, None], "area", tries))
    ratio = np.exp((2 * _uniform(seeds[:, None], "ratio", tries) - 1) * math.log(RATIO))
    sides = np.rint(np.sqrt(np.stack((area / ratio, area * ratio))))  # height and width, (2, B, TRIES)
    fits = np.all((sides >= 1) & (sides <= size), axis=0)
    first = sides[:, np.arange(len(seeds)), np.argmax(fits, axis=1)]
    height, width = np.where(np.any(fits, axis=1), first, size)
    top = np.floor(_uniform(seeds, "top") * (size - height + 1))
    left = np.floor(_uniform(seeds, "left") * (size - width + 1))
    return np.stack((top, left, height, width), axis=1).astype(np.int64)


def resized_crops(images: Tensor, boxes: NDArray[np.int64]) -> Tensor:
    """Parts of uint8 images (B, C, S, S) at their full size, by linear interpolation between pixels of the part.

    A part is never larger than the image, so there is nothing that antialiasing would change. Boxes as `crop_boxes`.
    """
    size = images.shape[-1]
    first, sides = boxes[:, :2, None], boxes[:, 2:, None]  # of rows and columns, (B, 2, 1)
    places = first + sides * (np.arange(size) + 0.5) / size - 0.5  # 0 is the centre of the first pixel
    places = np.clip(places, first, first + sides - 1)
    # From -1 to 1, over the image.
    rows_BS, columns_BS = _on(((2 * places + 1) / size - 1).astype(np.float32), images.device).unbind(1)
    shape = (len(images), size, size)
    grid = torch.stack((columns_BS[:, None, :].expand(shape), rows_BS[:, :, None].expand(shape)), dim=-1)
    shown = grid_sample(images.float(), grid, mode="bilinear", padding_mode="border", align_corners=False)
    return shown.round_().to(torch.uint8)


def drawn_operations(seeds: Seeds, number: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Which of `count` operations falls on each image as its `number`-th, and whether with its negative form, (B,)."""
    chosen = (_uniform(seeds, "operation", np.uint64(number)) * count).astype(np.int64)
    return chosen, _uniform(seeds, "sign", np.uint64(number)) < 0.5


@lru_cache(maxsize=4)
def randaugment_operations(magnitude: int, size: int, device: torch.device) -> dict[str, tuple[Operation, ...]]:
    """torchvision's RandAugment at one magnitude, for uint8 images (n, C, size, size) on a device, by its names.

    Operations with a sign have two forms, for the magnitude and for its negative. Interpolation is to the nearest
    pixel, and what is outside of an image is black, as torchvision has it unless told otherwise.
    """

    def level(first: float, last: float) -> float:
        return float(torch.linspace(first, last, BINS)[magnitude])

    def moves(move: Amount, last: float) -> tuple[Operation, ...]:
        value = level(0.0, last)
        return tuple(_taking(lambda x, signed=signed: move(x, signed), size, device) for signed in (value, -value))

    def blends(blend: Amount) -> tuple[Operation, ...]:
        value = level(0.0, 0.9)
        return tuple(lambda images, factor=factor: blend(images, factor) for factor in (1 + value, 1 - value))

    bits, threshold = round(8 - magnitude / ((BINS - 1) / 4)), 255 * level(1.0, 0.0)
    return {
        "Identity": (lambda images: images,),
        "ShearX": moves(lambda x, magnitude: _shear(x, [magnitude, 0.0]), 0.3),
        "ShearY": moves(lambda x, magnitude: _shear(x, [0.0, magnitude]), 0.3),
        "TranslateX": moves(lambda x, magnitude: _translate(x, [int(magnitude), 0]), 150.0 / 331.0 * size),
        "TranslateY": moves(lambda x, magnitude: _translate(x, [0, int(magnitude)]), 150.0 / 331.0 * size),
        "Rotate": moves(lambda x, magnitude: library.rotate(x, magnitude), 30.0),
        "Brightness": blends(library.adjust_brightness),
        "Color": blends(library.adjust_saturation),
        "Contrast": blends(library.adjust_contrast),
        "Sharpness": blends(_sharpen),
        "Posterize": (lambda images: library.posterize(images, bits),),
        "Solarize": (lambda images: library.solarize(images, threshold),),
        "AutoContrast": (library.autocontrast,),
        "Equalize": (library.equalize,),
    }


def _distort(
    images: Tensor,
    operations: dict[str, tuple[Operation, ...]],
    chosen: NDArray[np.int64],
    negative: NDArray[np.bool_],
) -> Tensor:
    """Each image through an operation of its own: sorted by them, so that each is called once."""
    forms = [operation[sign % len(operation)] for operation in operations.values() for sign in (0, 1)]
    wanted = 2 * chosen + negative
    order = np.argsort(wanted, kind="stable")
    present, starts = np.unique(wanted[order], return_index=True)
    parts = images.index_select(0, _on(order, images.device)).tensor_split(starts[1:].tolist())
    done = torch.cat([forms[number](part) for number, part in zip(present.tolist(), parts, strict=True)])
    return done.index_select(0, _on(np.argsort(order), images.device))


def _taking(move: Operation, size: int, device: torch.device) -> Operation:
    """An operation that moves pixels, from what it does to an image of their numbers.

    torchvision's own make a matrix on the host at each call and wait for the device to have it.
    """
    numbers = torch.arange(1, size * size + 1, dtype=torch.float32).view(1, 1, size, size)
    taken = move(numbers).flatten().to(torch.int64)
    source, inside = (taken - 1).clamp(min=0).to(device), (taken > 0).to(torch.uint8).to(device)
    return lambda images: images.flatten(2).index_select(2, source).mul_(inside).view_as(images)


def _shear(images: Tensor, tangents: list[float]) -> Tensor:
    """About the top left corner."""
    degrees = [math.degrees(math.atan(tangent)) for tangent in tangents]
    return library.affine(images, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0])


def _translate(images: Tensor, pixels: list[int]) -> Tensor:
    return library.affine(images, angle=0.0, translate=[float(n) for n in pixels], scale=1.0, shear=[0.0, 0.0])


def _sharpen(images: Tensor, factor: float) -> Tensor:
    """torchvision's adjust_sharpness, which makes its kernel on the host at each call: ones around a five, over 13."""
    if images.shape[-1] < 3:
        return images
    sharp = images.to(torch.float32)
    inner = sharp[..., 1:-1, 1:-1]
    smooth = (avg_pool2d(sharp, 3, stride=1, divisor_override=1) + 4 * inner).div_(13).round_()
    inner.add_(smooth.sub_(inner), alpha=1.0 - factor)
    return sharp.clamp_(0, 255).to(torch.uint8)


def _uniform(seeds: Seeds, what: str, draws: NDArray[np.uint64] | np.uint64 | int = 0) -> NDArray[np.float64]:
    """In [0, 1), in the shape of `seeds` and `draws` together: another for each use of a seed."""
    mixed = derive(0, f"augment/{what}", seeds.view(np.uint64), np.asarray(draws, dtype=np.uint64)).view(np.uint64)
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _on(values: NDArray[np.generic], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)
