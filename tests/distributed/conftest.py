"""The warm pools: one rank and two."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import RankPool

Pools = dict[int, RankPool]


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    """Rank pools by world size, started at first use and killed at the end of the session."""
    made = {size: RankPool(size) for size in (1, 2)}
    yield made
    for pool in made.values():
        pool.stop()
