"""Signs of life between ranks: real processes on gloo, of which one falls silent, ends or works alone for long."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.end_to_end.zygote import free_port
from trainer.contact import Contact
from trainer.world import join_world, leave_world

TIMEOUT = 4.0
BUSY_SECONDS = 60.0  # for processes of a busy machine to do what takes no time
HOSTS = ["one", "two", "three"]
_context = multiprocessing.get_context("fork")  # torch is loaded, and no thread of it works


def meet(size: int, met: Path) -> Contact:
    """Join a world without DeepSpeed, and say so."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=BUSY_SECONDS))
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=BUSY_SECONDS))
    contact = Contact(TIMEOUT, group, HOSTS[:size])
    contact.start()
    met.touch()
    return contact


def work_alone(met: Path, seconds: float) -> None:
    """The main rank works; the others wait for it in a collective that waits for ever."""
    contact = meet(3, met)
    control: Any = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    if dist.get_rank() == 0:
        time.sleep(seconds)
    dist.all_reduce(torch.ones(1), group=control)
    contact.leave()


def end_apart(met: Path) -> None:
    """All ranks end with the same exit code, one of them earlier."""
    meet(3, met)
    if dist.get_rank() != 1:
        time.sleep(TIMEOUT / 2)
    os._exit(2)


def work_in_the_world(met: Path) -> None:
    """As in the trainer: the engine's collectives fail after the timeout, and words between ranks do not."""
    world = join_world(0, 1, TIMEOUT)
    met.touch()
    world.on_main(lambda: time.sleep(3 * TIMEOUT))
    assert float(world.sum(torch.ones(1))) == world.size
    leave_world(world, 0)


class Ranks:
    """Forked ranks of one world."""

    def __init__(self, path: Path, size: int, work: Callable[..., None], *arguments: float) -> None:
        self.told = [path / f"told-{rank}" for rank in range(size)]
        met = [path / f"met-{rank}" for rank in range(size)]
        place = {"WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

        def run(rank: int) -> None:
            sys.stderr = self.told[rank].open("w")
            names = {name: str(value) for name, value in {**place, "RANK": rank, "LOCAL_RANK": rank}.items()}
            os.environ.update(names, GLOO_SOCKET_IFNAME="lo")
            work(met[rank], *arguments)
            os._exit(0)

        self.all = [_context.Process(target=run, args=(rank,), daemon=True) for rank in range(size)]
        for rank in self.all:
            rank.start()
        end = time.monotonic() + BUSY_SECONDS
        while not all(path.exists() for path in met):
            assert time.monotonic() < end, [path.read_text() for path in self.told]
            time.sleep(0.01)

    def end(self, *ranks: int) -> list[int | None]:
        """Wait for some ranks; their exit codes."""
        for rank in ranks:
            self.all[rank].join(3 * TIMEOUT + BUSY_SECONDS)
        return [self.all[rank].exitcode for rank in ranks]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    """Makes ranks, which do not outlive the test."""
    started: list[Ranks] = []

    def make(size: int, work: Callable[..., None], *arguments: float) -> Ranks:
        started.append(Ranks(tmp_path, size, work, *arguments))
        return started[0]

    yield make
    for rank in started[0].all:
        rank.kill()


def test_work_of_one_rank_may_take_longer_than_the_timeout(start: Callable[..., Ranks]) -> None:
    assert start(3, work_alone, 3 * TIMEOUT).end(0, 1, 2) == [0, 0, 0]


def test_so_it_may_in_the_world_of_the_trainer(start: Callable[..., Ranks]) -> None:
    assert start(2, work_in_the_world).end(0, 1) == [0, 0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_silent_rank_is_named_and_all_end_in_time(start: Callable[..., Ranks], victim: int) -> None:
    ranks = start(3, work_alone, 600.0)
    time.sleep(TIMEOUT / 2)
    began = time.monotonic()
    pid = ranks.all[victim].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    assert ranks.end(*others) == [1, 1]
    assert time.monotonic() - began < TIMEOUT + 8.0, "within the timeout, and a little for a busy machine"
    told = [ranks.told[rank].read_text() for rank in others]
    line = f"error: rank {victim} on {HOSTS[victim]} has given no sign of life for 4 s (key cluster.timeout); the same"
    assert line in told[0]
    assert (line in told[1]) == (victim == 0), "who hears it from the main rank need not say so again"


def test_a_killed_rank_ends_one_that_works_alone(start: Callable[..., Ranks]) -> None:
    ranks = start(3, work_alone, 600.0)
    ranks.all[2].kill()
    assert ranks.end(0) == [1]
    # The collective that rank 1 waits in fails with rank 2, and so it may be heard of first.
    line = r"error: rank (1 on two|2 on three) has ended; the same command goes on"
    assert re.search(line, ranks.told[0].read_text())


def test_ranks_that_end_for_the_same_reason_keep_their_exit_codes(start: Callable[..., Ranks]) -> None:
    assert start(3, end_apart).end(0, 1, 2) == [2, 2, 2]
