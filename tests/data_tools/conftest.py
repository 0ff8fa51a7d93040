"""A raw data set to build from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from raw_data import raw


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    """4 classes, 8 training and 3 test images each, 6x6 grey."""
    arrays = raw(6, 1, 4, train=8, test=3)
    path = tmp_path / "raw.npz"
    (x, y), (u, v) = arrays["train"], arrays["test"]
    np.savez(path, x_train=x, y_train=np.array(y), x_test=u, y_test=np.array(v))
    return path
