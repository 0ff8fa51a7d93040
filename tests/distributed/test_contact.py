"""Signs of life between ranks: real processes on gloo, of which one falls silent, ends or works alone for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.zygote import free_port

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 4.0
BUSY_SECONDS = 20.0  # for a process of a busy machine to do what takes no time
RANK = f"""
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from trainer.contact import Contact
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
contact = Contact({TIMEOUT}, dist.new_group(backend="gloo", timeout=timedelta(seconds=60)), ["one", "two", "three"])
contact.start()
print("met", flush=True)
what, rank = sys.argv[1], dist.get_rank()
if rank == 0 and what == "long":
    time.sleep({3 * TIMEOUT})
if rank == 1 and what == "ending":
    os._exit(2)
if what == "ending":
    time.sleep({TIMEOUT / 2})
    os._exit(2)
if rank == 0 and what == "alone":
    time.sleep(600)
dist.all_reduce(torch.ones(1), group=control)
contact.leave()
print("left", flush=True)
os._exit(0)
"""


class Ranks:
    """Three ranks of one world; the first works alone where it is asked to."""

    def __init__(self, what: str) -> None:
        place = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        environ = os.environ | place | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", RANK, what],
                env=environ | {"RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(3)
        ]
        for rank in self.all:
            assert rank.stdout is not None
            assert rank.stdout.readline() == "met\n"

    def ends(self) -> list[tuple[int, str]]:
        """Exit code and complaints of each."""
        return [(rank.wait(TIMEOUT + BUSY_SECONDS), rank.communicate()[1]) for rank in self.all]


@pytest.fixture
def started() -> Iterator[list[Ranks]]:
    ranks: list[Ranks] = []
    yield ranks
    for rank in ranks[0].all:
        rank.kill()
        rank.communicate()


def test_work_of_one_rank_may_take_longer_than_the_timeout(started: list[Ranks]) -> None:
    started.append(Ranks("long"))
    assert [code for code, _ in started[0].ends()] == [0, 0, 0]


@pytest.mark.parametrize("victim", [0, 2])
def test_a_silent_rank_is_named_and_all_end_in_time(started: list[Ranks], victim: int) -> None:
    started.append(Ranks("alone"))
    ranks = started[0]
    time.sleep(TIMEOUT / 2)
    began = time.monotonic()
    os.kill(ranks.all[victim].pid, signal.SIGSTOP)
    others = [rank for rank in range(3) if rank != victim]
    for rank in others:
        assert ranks.all[rank].wait(TIMEOUT + BUSY_SECONDS) == 1
    assert time.monotonic() - began < TIMEOUT + 8.0, "within the timeout, and a little for a busy machine"
    told = [ranks.all[rank].communicate()[1] for rank in others]
    host = ["one", "two", "three"][victim]
    line = f"error: rank {victim} on {host} has given no sign of life for 4 s (key cluster.timeout); the same command"
    assert line in told[0]
    assert (line in told[1]) == (victim == 0), "who hears it from the main rank need not say so again"


def test_a_killed_rank_ends_one_that_works_alone(started: list[Ranks]) -> None:
    started.append(Ranks("alone"))
    ranks = started[0]
    ranks.all[2].kill()
    assert ranks.all[0].wait(TIMEOUT + BUSY_SECONDS) == 1
    assert "error: rank 2 on three has ended" in ranks.all[0].communicate()[1]


def test_ranks_that_end_for_the_same_reason_keep_their_exit_codes(started: list[Ranks]) -> None:
    started.append(Ranks("ending"))
    assert [code for code, _ in started[0].ends()] == [2, 2, 2]
