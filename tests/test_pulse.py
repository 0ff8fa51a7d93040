"""The word that all ranks have with each other: what stops, fails or holds up one rank does so to all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from trainer import pulse
from trainer.errors import ToldElsewhere, UserError
from trainer.pulse import LONGEST_INTERVAL, Pulse


@dataclass
class Meeting:
    """Where the threads of a test exchange words, as the ranks of a world do."""

    size: int
    rows: list[list[int]] = field(default_factory=list)
    count: int = 0  # of exchanges

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size, timeout=20)
        self.rows = [[] for _ in range(self.size)]

    def exchange(self, rank: int, words: Sequence[int]) -> list[list[int]]:
        self.rows[rank] = [int(word) for word in words]
        self.barrier.wait()
        seen = [list(row) for row in self.rows]
        if self.barrier.wait() == 0:
            self.count += 1
        assert len({len(row) for row in seen}) == 1, "ranks say equally many words"
        return seen


@dataclass
class Rank:
    meeting: Meeting
    rank: int

    @property
    def size(self) -> int:
        return self.meeting.size

    def exchange(self, words: Sequence[int]) -> list[list[int]]:
        return self.meeting.exchange(self.rank, words)


@dataclass
class Late:
    """A replay of which a rank has loaded some steps; more with each wait."""

    loaded: int
    waits: int = 0
    width = 1

    def words(self, step: int) -> list[int]:
        return [self.loaded]

    def heed(self, step: int, rows: Sequence[Sequence[int]]) -> int:
        return max(step, min(row[0] for row in rows))

    def wait(self, step: int, seconds: float) -> None:
        self.waits += 1
        self.loaded += 1


def together(work: Callable[[int], None], size: int) -> list[BaseException | None]:
    """Run `work(rank)` in as many threads; what each raised."""
    with ThreadPoolExecutor(size) as threads:
        working = [threads.submit(work, rank) for rank in range(size)]
        return [thread.exception(30) for thread in working]


def nothing() -> None:
    """No failure on this rank."""


def test_a_step_begins_when_every_rank_holds_its_replay() -> None:
    meeting, replays = Meeting(3), [Late(5), Late(0), Late(3)]
    begun: list[list[int]] = [[], [], []]

    def work(rank: int) -> None:
        one = Pulse(Rank(meeting, rank), lambda: False, nothing)
        for step in range(6):
            assert one.may_begin(step, replays[rank])
            assert all(replay.loaded > step for replay in replays)
            begun[rank].append(step)

    assert together(work, 3) == [None] * 3
    assert begun == [list(range(6))] * 3
    assert replays[1].waits == replays[0].waits == replays[2].waits


def test_a_stop_wanted_by_one_rank_stops_all_at_one_step() -> None:
    meeting, stopped = Meeting(2), [-1, -1]

    def work(rank: int) -> None:
        wanted = False
        one = Pulse(Rank(meeting, rank), lambda: wanted, nothing)
        for step in range(100):
            wanted = rank == 1 and step >= 7
            if not one.may_begin(step, None):
                stopped[rank] = step
                return

    assert together(work, 2) == [None, None]
    assert stopped[0] == stopped[1]
    assert 7 <= stopped[0] <= 7 + LONGEST_INTERVAL


def test_a_stop_is_heeded_while_the_ranks_wait_for_replay() -> None:
    meeting = Meeting(1)
    looks = iter([False] * 5 + [True])
    never = Late(-(10**9))
    assert not Pulse(Rank(meeting, 0), lambda: next(looks), nothing).may_begin(0, never)
    assert never.waits == 5


@pytest.mark.parametrize("error", [UserError("no pool"), OSError(5, "Input/output error", "/pool")])
def test_a_failure_of_one_rank_ends_all_and_is_told_once(error: Exception) -> None:
    meeting = Meeting(2)

    def look() -> None:
        raise error

    def work(rank: int) -> None:
        Pulse(Rank(meeting, rank), lambda: False, look if rank == 1 else nothing).may_begin(0, Late(9))

    raised = together(work, 2)
    assert isinstance(raised[0], ToldElsewhere)
    assert isinstance(raised[1], UserError)
    assert not isinstance(raised[1], ToldElsewhere)
    assert ("no pool" in str(raised[1])) or "/pool: Input/output error" in str(raised[1])


def test_exchanges_are_as_rare_as_steps_are_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """About twice a second: before every step where steps are slow, every LONGEST_INTERVAL steps where fast."""
    for seconds, expected in ((10.0, 40), (0.1, 8), (0.001, 40 // LONGEST_INTERVAL + 1)):
        clock = 0.0
        monkeypatch.setattr(pulse.time, "monotonic", lambda: clock)  # noqa: B023 - used within this turn
        meeting = Meeting(1)
        one = Pulse(Rank(meeting, 0), lambda: False, nothing)
        for step in range(41):
            assert one.may_begin(step, None)
            clock += seconds
        assert abs(meeting.count - expected) <= 3


def test_a_task_starts_counting_anew() -> None:
    meeting = Meeting(1)
    one = Pulse(Rank(meeting, 0), lambda: False, nothing)
    assert one.may_begin(50, None)
    one.start()
    replay = Late(0)
    assert one.may_begin(0, replay)
    assert replay.waits == 1
