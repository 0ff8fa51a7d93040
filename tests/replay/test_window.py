"""Backpressure: a pool never outgrows its limit, rests between its marks, and always serves a trainer that waits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.replay.pool import NEVER, discard
from trainer.replay.state import write_json
from trainer.replay.window import Filling, Limits, Progress, read_progress


@dataclass
class Plant:
    """A trainer and its samplers, each knowing only what the files say: every move is one of theirs."""

    batch: int  # replay points per step
    uses: int  # points per shard
    steps: int
    interval: int  # steps between checkpoints
    limits: Limits
    kept_shards: int
    workers: int
    step: int = 0
    saved: int = 0  # step of the checkpoint
    published: set[int] = field(default_factory=set)
    disk: set[int] = field(default_factory=set)
    kept: range = range(0)
    said: Progress = field(default_factory=Progress)
    released: int = 0

    def __post_init__(self) -> None:
        self.filling = [Filling() for _ in range(self.workers)]
        self.working: list[int | None] = [None] * self.workers

    def needed(self) -> range:
        first = self.step * self.batch
        return range(first // self.uses, (first + self.batch - 1) // self.uses + 1)

    def served(self) -> bool:
        return self.step >= self.steps or self.published.issuperset(self.needed())

    def say(self) -> None:
        self.said = Progress(self.released, self.kept, self.needed().start)

    def train(self) -> None:
        """The next step, if its shards are there; a checkpoint where one is due."""
        if self.step >= self.steps or not self.served():
            self.say()
            return
        if self.kept_shards:
            self.kept = range(max(self.needed().stop - self.kept_shards, 0), self.needed().stop)
        self.step += 1
        if self.step % self.interval == 0:
            self.saved, self.released = self.step, max(0, self.step * self.batch // self.uses - 1)
            self.say()

    def resume(self) -> None:
        self.step, self.kept = self.saved, range(0)
        self.say()

    def corrupt(self, number: int) -> None:
        """The trainer asks for a shard again; the file lies there still."""
        if self.published:
            self.published.discard(sorted(self.published)[number % len(self.published)])

    def begin(self, worker: int) -> None:
        if self.working[worker] is None:
            wanted = self.filling[worker].wanted(self.published, self.said, self.limits)
            self.working[worker] = next((shard for shard in wanted if shard % self.workers == worker), None)

    def finish(self, worker: int) -> None:
        shard, self.working[worker] = self.working[worker], None
        if shard is None or shard not in self.limits.room(self.said):
            return
        for other in self.limits.surplus(shard, self.disk | self.published, self.said):
            self.disk.discard(other)
            self.published.discard(other)
        self.disk.add(shard)
        self.published.add(shard)

    def restart(self, worker: int) -> None:
        self.filling[worker], self.working[worker] = Filling(), None

    def settle(self) -> None:
        """Samplers work until none has anything to do; the trainer, which waits, has said where it is."""
        self.say()
        for _ in range(4 * self.limits.total + 4):
            for worker in range(self.workers):
                self.begin(worker)
                self.finish(worker)

    def check(self) -> None:
        assert len(self.disk) <= self.limits.capacity
        assert self.published <= self.disk


@st.composite
def plants(draw: st.DrawFn) -> Plant:
    batch, uses, interval = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 6))
    steps, kept = draw(st.integers(1, 30)), draw(st.sampled_from([0, 0, 2, 4]))
    total, ahead = math.ceil(steps * batch / uses), math.ceil(5 * batch / uses) + 1
    between = math.ceil(min(steps, interval) * batch / uses)
    capacity = min(total, between + 3 + kept) + draw(st.integers(0, 4))  # as small as a request may have it
    high = draw(st.one_of(st.just(capacity), st.integers(min(ahead, total), ahead + total)))
    low = max(int(draw(st.floats(0.0, 0.99)) * high), ahead)
    return Plant(batch, uses, steps, interval, Limits(total, capacity, high, low), kept, draw(st.integers(1, 3)))


MOVES = ("train", "train", "train", "begin", "begin", "finish", "finish", "corrupt", "resume", "restart", "say")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(plants(), st.lists(st.tuples(st.sampled_from(MOVES), st.integers(0, 50)), max_size=150))
def test_no_more_than_the_limit_and_a_waiting_trainer_is_always_served(
    plant: Plant, moves: list[tuple[str, int]]
) -> None:
    for move, number in moves:
        if move in ("train", "resume", "say"):
            getattr(plant, move)()
        else:
            getattr(plant, move)(number if move == "corrupt" else number % plant.workers)
        plant.check()
    while plant.step < plant.steps:
        plant.settle()
        plant.check()
        assert plant.served(), "trainer and samplers wait for each other"
        plant.train()


def test_it_rests_between_the_marks() -> None:
    limits, filling, published, made = Limits(total=100, capacity=40, high=10, low=4), Filling(), set[int](), []
    for used in range(40):
        progress = Progress(max(0, used - 15), range(0), used)
        wanted = filling.wanted(published, progress, limits)
        published.update(wanted)
        made.append(len(wanted))
        assert filling.wanted(published, progress, limits) == []
    # From full (used + 10) down to 4 left, 6 later, then up again by what was used.
    assert made[:13] == [11, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 6] and sum(made) == 11 + 6 * 6


def test_a_sampler_at_rest_fills_holes() -> None:
    limits, filling = Limits(total=100, capacity=40, high=10, low=4), Filling()
    published = set(range(11))
    assert filling.wanted(published, Progress(), limits) == []
    published.remove(7)
    assert filling.wanted(published, Progress(0, range(0), 1), limits) == [7]


def test_what_the_trainer_has_passed_is_not_made() -> None:
    limits = Limits(total=100, capacity=40, high=10, low=4)
    assert Filling().wanted({2}, Progress(0, range(0), 5), limits) == list(range(5, 16))


def test_bytes_win_over_the_high_mark() -> None:
    limits = Limits(total=100, capacity=8, high=10, low=4)
    assert Filling().wanted(set(), Progress(3, range(1, 3), 5), limits) == [5, 6, 7, 8]  # 3 and 4 used, 1 and 2 kept


def test_a_trainer_that_does_not_say_where_it_is_is_never_kept_waiting() -> None:
    limits = Limits(total=100, capacity=8, high=4, low=2)
    assert Filling().wanted(set(range(7)), Progress(0, range(0), None), limits) == [7]


def test_limits_of_a_request(workplace: Any) -> None:
    request = replace(workplace.request, pool_bytes=20 * workplace.request.shard_bytes, low_watermark=0.5)
    assert request.shards_ahead == 4  # 5 steps of 8 points touch up to 4 shards of 18
    assert Limits.of(request) == Limits(total=9, capacity=20, high=20, low=10)
    assert Limits.of(replace(request, pool_shards=12)) == Limits(total=9, capacity=20, high=12, low=6)
    assert Limits.of(replace(request, pool_shards=6)).low == 4


@pytest.mark.parametrize(
    "content",
    [
        [1],
        {"released": 1.5, "kept": [0, 0], "used": 0},
        {"released": 1, "kept": [0], "used": 0},
        {"released": 1, "kept": [0, "x"], "used": 0},
        {"released": 1, "kept": [0, 0], "used": True},
        {"kept": [0, 0]},
    ],
)
def test_a_malformed_progress_file_is_as_good_as_none(workplace: Any, content: Any) -> None:
    path = workplace.run.replay_progress(2)
    write_json(path, content)
    assert read_progress(path) is None
    write_json(path, {"released": 4, "kept": [1, 3], "used": 6})
    assert read_progress(path) == Progress(4, range(1, 3), 6)


def test_progress_that_becomes_unreadable_changes_nothing(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(pool_shards=4)
    sampler, path = workplace.sampler(), workplace.run.replay_progress(2)
    request = sampler.current_request()
    write_json(path, {"released": 5, "kept": [0, 0], "used": 6})
    assert sampler.next_shard(request) == 6
    path.write_text("{")
    assert sampler.next_shard(request) == 6


def test_a_sampler_fills_to_the_mark_rests_and_is_complete(make_workplace: Callable[..., Any]) -> None:
    workplace = make_workplace(pool_shards=4, low_watermark=0.5)
    sampler = workplace.sampler()
    path, request = workplace.run.replay_progress(2), sampler.current_request()

    def work(used: int) -> tuple[list[int], str]:
        write_json(path, {"released": 0, "kept": [0, 0], "used": used})
        made = []
        while (shard := sampler.next_shard(request)) is not None:
            sampler.make_shard(request, shard)
            made.append(shard)
        sampler._rest(request)
        return made, sampler._status

    assert work(0) == ([0, 1, 2, 3, 4], "resting")
    assert work(0) == ([], "resting")
    assert work(6) == ([6, 7, 8], "complete")  # and 5 is past
    discard(workplace.run, 2)
    assert work(NEVER) == ([], "complete")
