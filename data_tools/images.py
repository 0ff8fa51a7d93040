"""Bringing raw images to the size and channels of a data set: one rule for all sources."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_tools.sources.base import Pixels


def fit(image_HWC: Pixels, image_size: int, channels: int, enlarge: bool = False) -> Pixels:
    """An image as uint8 (image_size, image_size, channels).

    1. Where the shorter side exceeds `image_size`, it is reduced to it by Pillow's bicubic filter, which antialiases
       (the filter of clean-fid; Parmar et al. 2022, arXiv 2104.11222). Where it falls short, it is brought to it by
       the same filter if `enlarge`, and else left as it is.
    2. What then exceeds `image_size` is cropped around the centre; what falls short is centred on zeros (black). So
       28x28 becomes 32x32 by two black pixels on each side.
    3. Grey becomes colour by repetition, colour becomes grey by the luma of ITU-R 601.
    """
    return _channels(_centre(_resize(image_HWC, image_size, enlarge), image_size), channels)


def _resize(image_HWC: Pixels, image_size: int, enlarge: bool) -> Pixels:
    height, width, depth = image_HWC.shape
    shorter = min(height, width)
    if shorter == image_size or (shorter < image_size and not enlarge):
        return image_HWC
    target = (round(width * image_size / shorter), round(height * image_size / shorter))
    image = Image.fromarray(image_HWC[:, :, 0] if depth == 1 else image_HWC)
    resized = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    return resized[:, :, None] if depth == 1 else resized


def _centre(image_HWC: Pixels, image_size: int) -> Pixels:
    height, width, depth = image_HWC.shape
    if (height, width) == (image_size, image_size):
        return image_HWC
    top, left = max(0, height - image_size) // 2, max(0, width - image_size) // 2
    part = image_HWC[top : top + image_size, left : left + image_size]
    canvas = np.zeros((image_size, image_size, depth), dtype=np.uint8)
    top, left = (image_size - part.shape[0]) // 2, (image_size - part.shape[1]) // 2
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return canvas


def _channels(image_HWC: Pixels, channels: int) -> Pixels:
    depth = image_HWC.shape[2]
    if depth == channels:
        return image_HWC
    if channels == 3:
        return np.repeat(image_HWC, 3, axis=2)
    return np.asarray(Image.fromarray(image_HWC).convert("L"))[:, :, None]
