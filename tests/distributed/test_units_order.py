"""Weights of the real U-Net, whose modules are not in the order of its blocks, are found where they lie."""

from __future__ import annotations

import pytest

from tests.distributed.conftest import Pools


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_gives_back_the_weights_that_it_was_given(pools: Pools, stage: int, ranks: int) -> None:
    assert all(rank == [] for rank in pools[ranks].run("unet_weights", stage=stage))
