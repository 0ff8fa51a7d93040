"""Every kernel compiles for a GPU, which needs none: the interpreter of the other tests accepts more than that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.kernels.launch import cut

sass = pytest.importorskip("sass", reason="needs Triton", exc_type=ImportError)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("case", sass.CASES, ids=lambda case: case.name)
def test_wide_and_without_detours(case: Any) -> None:
    """No registers spilled, nothing handed round through shared memory, results stored 16 bytes at a time."""
    found = sass.count(case)
    assert found["stack"] == found["shared"] == found["barriers"] == 0
    assert set(found["stores"]) == {"STG.E.128"}


@pytest.mark.parametrize("case", sass.SUMS + sass.RAGGED, ids=lambda case: case.name)
def test_sums_and_ragged_sizes(case: Any) -> None:
    assert sass.count(case)["stack"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", [1, 2, 3, 16, 97, 128, 192, 768, 3072, 12289, 2**20])
def test_programs_cover_every_place(places: int, dtype: torch.dtype) -> None:
    blocks = cut(places, dtype)
    assert (blocks.count - 1) * blocks.size < places <= blocks.count * blocks.size
    assert blocks.even == (places % blocks.size == 0) and blocks.size & (blocks.size - 1) == 0
    assert blocks.num_warps in (1, 2, 4) and blocks.size <= 128 * 16 // dtype.itemsize
