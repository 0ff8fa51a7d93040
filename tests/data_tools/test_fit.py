"""The one rule of sizes and channels, against Pillow and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data_tools.images import fit


def random(height: int, width: int, channels: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.random.default_rng(1).integers(0, 256, (height, width, channels), dtype=np.uint8)


def test_28_becomes_32_by_two_black_pixels_on_each_side() -> None:
    image = random(28, 28, 1)
    assert np.array_equal(fit(image, 32, 1), np.pad(image, ((2, 2), (2, 2), (0, 0))))


def test_the_right_size_is_untouched() -> None:
    image = random(9, 9, 3)
    assert np.array_equal(fit(image, 9, 3), image)


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 40), (100, 41), (40, 40)])
@pytest.mark.parametrize("channels", [1, 3])
def test_larger_images_are_reduced_by_the_shorter_side_then_cropped(height: int, width: int, channels: int) -> None:
    image = random(height, width, channels)
    size = 16
    target = (round(width * size / min(height, width)), round(height * size / min(height, width)))
    reduced = Image.fromarray(image[..., 0] if channels == 1 else image).resize(target, Image.Resampling.BICUBIC)
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    expected = np.asarray(reduced.crop((left, top, left + size, top + size))).reshape(size, size, channels)
    assert np.array_equal(fit(image, size, channels), expected)


def test_reduction_is_antialiased() -> None:
    """A checkerboard of single pixels becomes even grey, not a moire."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]
    assert np.abs(fit(board, 16, 1)[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_a_narrow_image_is_cropped_and_padded() -> None:
    image = random(4, 20, 1)
    expected = np.zeros((8, 8, 1), np.uint8)
    expected[2:6] = image[:, 6:14]
    assert np.array_equal(fit(image, 8, 1), expected)


def test_channels() -> None:
    grey, colour = random(5, 5, 1), random(5, 5, 3)
    assert np.array_equal(fit(grey, 5, 3), np.concatenate([grey] * 3, axis=2))
    luma = colour.astype(np.float64) @ [0.299, 0.587, 0.114]  # ITU-R 601
    assert np.abs(fit(colour, 5, 1)[..., 0] - luma).max() <= 1
