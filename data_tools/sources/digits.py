"""scikit-learn's handwritten digits: 1,797 grey 8x8 images, embedded in its wheel (Alpaydin & Kaynak 1998)."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_tools.sources.base import ArraySource, split_arrays

TEST_FRACTION = 0.2


def open_digits() -> ArraySource:
    """Values 0..16 scaled to 0..255; a fixed stratified fifth is the test split (1,438 and 359 images)."""
    from sklearn.datasets import load_digits  # slow to import, and only this source needs it

    digits: Any = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    parts = split_arrays(images, np.asarray(digits.target, dtype=np.int64), TEST_FRACTION)
    return ArraySource([str(digit) for digit in range(10)], *parts, where="scikit-learn's digits")
