"""The profiler switch, through the real loop on two ranks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from tests.distributed.conftest import Pools

SETTINGS = [
    "model.channels=[8,8]",
    "model.norm_groups=4",
    "train.images_per_task=128",  # 8 steps
    "train.global_batch=16",
    "train.micro_batch=4",
    "ema.decay=0.9",
]
PROFILE = ["tracking.profile_steps=2", "tracking.profile_start=4"]


def learn(pools: Pools, root: Path, name: str, *settings: str) -> Any:
    arguments = {"root": str(root), "name": name, "settings": [*SETTINGS, *settings], "poisoned": []}
    return pools[2].run("learn", **arguments)


def test_every_rank_leaves_a_trace_and_the_weights_are_the_same(pools: Pools, tmp_path: Path) -> None:
    plain = learn(pools, tmp_path, "plain")
    found = learn(pools, tmp_path, "profiled", *PROFILE)
    assert [rank["teacher"] for rank in found] == [rank["teacher"] for rank in plain]
    assert not (tmp_path / "plain" / "logs").exists()
    for rank in range(2):
        trace = tmp_path / "profiled" / "logs" / "attempt-0" / f"profile-rank-{rank}.json.gz"
        events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
        names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
        assert sorted(name for name in names if name.startswith("ProfilerStep")) == ["ProfilerStep#3", "ProfilerStep#4"]
        counts = {name: names.count(name) for name in ("data", "prepare", "replay", "optimizer", "ema")}
        assert counts == dict.fromkeys(counts, 2)
        assert names.count("forward") == names.count("backward") == 4  # two micro-batches each
        assert {"aten::convolution", "c10d::allreduce_"} <= {event["name"] for event in events}
        table = trace.with_name(f"profile-rank-{rank}.txt").read_text()
        assert "Self CPU" in table and "backward" in table
    assert not list((tmp_path / "profiled" / "logs").rglob(".*"))


def test_a_task_that_ends_in_the_window_leaves_what_was_recorded(pools: Pools, tmp_path: Path) -> None:
    learn(pools, tmp_path, "run", "tracking.profile_steps=20", "tracking.profile_start=6")
    trace = tmp_path / "run" / "logs" / "attempt-0" / "profile-rank-0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    assert sum(event["name"] == "optimizer" and event["cat"] == "user_annotation" for event in events) == 2
