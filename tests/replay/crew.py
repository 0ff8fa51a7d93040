"""The sources of all ranks of a world in one process."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from typing import Any

import torch

from trainer.config import OnStarved
from trainer.data.batch import Examples
from trainer.diffusion.schedules import make_schedule
from trainer.replay.events import count_events
from trainer.replay.source import PoolSource
from trainer.replay.state import read_json

CPU = torch.device("cpu")


@dataclass
class Ranks:
    """A rank's place; the words of all ranks go through their Crew."""

    rank: int = 0
    size: int = 1

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        raise AssertionError("the crew does this")


class Crew:
    """The sources of all ranks of a world, which have their words in lockstep."""

    def __init__(self, workplace: Any, size: int = 1, **changes: Any) -> None:
        options: dict[str, Any] = {
            "batch": 8,
            "schedule": make_schedule(workplace.config.diffusion),
            "device": CPU,
            "dtype": torch.float32,
            "on_starved": OnStarved.wait,
            "timeout": 20.0,
            "reuse_cap": 4,
        }
        options |= changes
        self.ranks = [
            PoolSource(workplace.run, workplace.request, world=Ranks(rank, size), **options) for rank in range(size)
        ]
        self.exchanges = 0

    def agree(self, step: int) -> int:
        """One exchange; the first step that cannot begin, on which all ranks agree."""
        rows = [rank.words(step) for rank in self.ranks]
        self.exchanges += 1
        assert {len(row) for row in rows} == {self.ranks[0].width}
        until = {rank.heed(step, rows) for rank in self.ranks}
        assert len(until) == 1
        return until.pop()

    def may_begin(self, step: int, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while self.agree(step) <= step:
            assert time.monotonic() < deadline, "starved"
            for rank in self.ranks:
                rank.wait(step, 0.01)

    def shares(self, step: int) -> list[Examples | None]:
        """Each rank's points of a step."""
        self.may_begin(step)
        return [rank.points(step) for rank in self.ranks]

    def points(self, step: int) -> Any:
        """The points of a step over all ranks; None where it goes without."""
        parts = self.shares(step)
        if None in parts:
            assert parts == [None] * len(parts)
            return None
        names = ("x", "t", "target", "label")
        return Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    @property
    def main(self) -> PoolSource:
        return self.ranks[0]

    def stats(self) -> dict[str, Any]:
        return self.main.stats()

    def events(self) -> dict[str, int]:
        return {kind: count for kind, count in count_events(self.main.run).items() if count}

    def told(self) -> dict[str, Any]:
        """What the samplers were told last, once it is written."""
        for _ in range(2):  # the first may find an older word under way
            self.main._tell_samplers()
            wait([self.main._telling])  # type: ignore[list-item]
        return read_json(self.main.run.replay_progress(2))

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()
