"""The micro-batch that `auto` finds on two ranks of unequal room."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import Pools

SETTINGS = ["model.channels=[8,8]", "model.norm_groups=4", "train.images_per_task=64", "train.global_batch=32"]


@pytest.mark.parametrize("stage", [1, 3])
def test_all_ranks_take_what_the_fullest_has_room_for(pools: Pools, tmp_path: Path, stage: int) -> None:
    """And train the model of a run to which that number was given, bit for bit."""
    settings = [*SETTINGS, f"zero.stage={stage}"]
    common = {"root": str(tmp_path), "settings": settings}
    found = pools[2].run("choose_and_learn", name="auto", most=[9, 5], **common)
    assert [rank["found"] for rank in found] == [4, 4]  # of 16, 8, 4, 2, 1
    common["settings"] = [*settings, "train.micro_batch=4"]
    named = pools[2].run("learn", name="named", poisoned=[], **common)
    assert [rank["teacher"] for rank in found] == [rank["teacher"] for rank in named]
