"""The pool itself, and the world's collectives."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.distributed.conftest import Pools
from tests.distributed.pool import CaseFailed
from trainer.config import ClusterConfig
from trainer.world import PATIENCE


def test_world_methods(pools: Pools) -> None:
    for rank, found in enumerate(pools[2].run("world_methods")):
        assert found == {
            "rank": rank,
            "size": 2,
            "main": rank == 0,
            "device": "cpu",
            "broadcast": 2**60,
            "any": [False, True],
            "gathered": [[0.0, 10.0], [1.0, 11.0]],
            "interface": "lo",
            "threads": 1,
            "shared_memory": [],
        }


def test_a_world_of_one(pools: Pools) -> None:
    found = pools[1].run("world_methods")[0]
    assert (found["size"], found["broadcast"], found["any"], found["gathered"]) == (1, 2**60, [False, False], [[0, 10]])


def test_what_fails_on_the_main_rank_ends_all(pools: Pools) -> None:
    assert pools[2].run("main_only", failing=False) == ["done", "None"]
    assert pools[2].run("main_only", failing=True) == [
        "UserError: metrics.json: No space left on device; key run.dir",
        "ToldElsewhere: the main rank failed",
    ]


def test_collectives_have_our_timeout(pools: Pools) -> None:
    """Also those of DeepSpeed's own groups; but words between ranks wait for the work of one of them."""
    ours = ClusterConfig().timeout
    assert pools[2].run("group_timeouts") == [[ours, ours, PATIENCE.total_seconds()]] * 2


def test_work_of_all_ranks_is_done_by_the_main_one_first(pools: Pools, tmp_path: Path) -> None:
    path = str(tmp_path / "cached")
    assert pools[2].run("everywhere", path=path, failing=-1) == ["False", "True"]
    assert pools[1].run("everywhere", path=path, failing=-1) == ["True"]
    for failing, other in ((0, "the main rank failed"), (1, "rank 1 failed")):
        answers = pools[2].run("everywhere", path=path, failing=failing)
        assert answers[failing] == "UserError: no weights here"
        assert answers[1 - failing] == f"ToldElsewhere: {other}"


def test_a_failed_case_reports_and_does_not_poison_the_next(pools: Pools) -> None:
    with pytest.raises(CaseFailed, match=r"rank 1:(.|\n)*ValueError: as asked"):
        pools[2].run("fail", rank=1)
    assert [found["rank"] for found in pools[2].run("world_methods")] == [0, 1]


def test_a_case_that_hangs_is_ended(pools: Pools) -> None:
    begin = time.monotonic()
    with pytest.raises(CaseFailed, match=r"within 0\.5 s"):
        pools[1].run("stall", limit=0.5)
    assert time.monotonic() - begin < 30
