"""Signs of life between the trainer ranks: whoever waits, however long, hears within `cluster.timeout` of a rank that
is gone.

While the main rank works alone (an evaluation, a data set to build) the others wait for it in a collective, and
nobody knows how long that takes. So it is not the waiting that is bounded but the silence: a thread of each rank
exchanges a word with the main rank every few seconds, by a group of its own. A process that was killed, a host without
power and a network that was cut all fall silent; one that is at work does not.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import say

LOST = 1  # exit code of a rank that has lost another
LONGEST_INTERVAL = 5.0  # seconds between two words
ENDING_SECONDS = 30.0  # for a rank whose peer has ended to say itself why all end, and to end
GOES_ON, LEAVES, LOSES = range(3)  # what a word says; LOSES + r: rank r


class Contact:
    """The thread of one rank: the main rank hears all others, they hear the main rank."""

    def __init__(self, timeout: float, group: Any, hosts: Sequence[str], end: Callable[[int], Any] = os._exit) -> None:
        """
        Args:
            timeout: seconds of silence after which a rank counts as lost.
            group: a gloo ProcessGroup of all ranks, which nothing else uses.
            hosts: of each rank, by name.
            end: ends this process with an exit code.
        """
        self.timeout, self._group, self._hosts, self._end = timeout, group, hosts, end
        self._rank, self._size = dist.get_rank(), dist.get_world_size()
        self.interval = min(LONGEST_INTERVAL, timeout / 16)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="contact", daemon=True)

    def start(self) -> None:
        """Call on all ranks."""
        self._thread.start()

    def leave(self) -> None:
        """Wait until every rank is about to leave the world; collective."""
        self._leaving.set()
        self._thread.join()

    def _keep(self) -> None:
        goes_on = True
        while goes_on:
            self._leaving.wait(self.interval)
            word = LEAVES if self._leaving.is_set() else GOES_ON
            answer = self._lead(word) if self._rank == 0 else self._follow(word)
            if answer >= LOSES:
                return
            goes_on = answer == GOES_ON

    def _lead(self, word: int) -> int:
        """Hear all others, tell them what comes of it; the answer."""
        # The one who waits for all gives up first, so that it can name the rank that is silent.
        began, patience = time.monotonic(), self.timeout - 2 * self.interval
        words = {rank: torch.empty(1, dtype=torch.int64) for rank in range(1, self._size)}
        listening: dict[int, Any] = {}
        answer = word
        for ask in (self._listen, self._hear):
            for rank, said in words.items():
                left = began + patience - time.monotonic()
                if answer < LOSES and not ask(listening, rank, said, left):
                    answer = LOSES + rank
        if answer < LOSES:
            answer = min(answer, *(int(said) for said in words.values()))  # all leave together
        self._tell(answer)
        if answer >= LOSES:
            self._lost(answer - LOSES, time.monotonic() - began < patience)
        return answer

    def _listen(self, listening: dict[int, Any], rank: int, word: Tensor, _: float) -> bool:
        """Begin to wait for a rank's word; whether that is possible."""
        with suppress(RuntimeError):
            listening[rank] = dist.irecv(word, src=rank, group=self._group)
        return rank in listening

    @staticmethod
    def _hear(listening: dict[int, Any], rank: int, _: Tensor, seconds: float) -> bool:
        """Wait for a rank's word, so long at most; whether it came."""
        try:
            listening[rank].wait(timedelta(seconds=max(0.001, seconds)))
        except RuntimeError:
            return False
        return True

    def _tell(self, answer: int) -> None:
        told = torch.tensor([answer])
        for rank in range(1, self._size):
            with suppress(RuntimeError):  # it is gone: the next round notices, unless this one has
                work = dist.isend(told, dst=rank, group=self._group)
                assert work is not None, "this rank is of the group"
                if answer < LOSES:
                    work.wait()

    def _follow(self, word: int) -> int:
        """Say this rank's word to the main one; its answer."""
        answer = torch.empty(1, dtype=torch.int64)
        began, patience = time.monotonic(), timedelta(seconds=self.timeout - self.interval)
        try:
            for work in (
                dist.isend(torch.tensor([word]), dst=0, group=self._group),
                dist.irecv(answer, src=0, group=self._group),
            ):
                assert work is not None, "this rank is of the group"
                work.wait(patience)
        except RuntimeError:
            self._lost(0, time.monotonic() - began < patience.total_seconds())
            return LOSES
        if int(answer) >= LOSES:
            self._finish("")  # the main rank says which
        return int(answer)

    def _lost(self, rank: int, at_once: bool) -> None:
        """End this process: at once after a silence, a while later where the other side has closed the connection."""
        silent = f"has given no sign of life for {self.timeout:.0f} s (key cluster.timeout)"
        what = "has ended" if at_once else silent
        told = f"error: rank {rank} on {self._hosts[rank]} {what}; the same command goes on from the last checkpoint"
        if at_once and self._leaving.wait(min(ENDING_SECONDS, self.timeout - 2 * self.interval)):
            return  # this rank ends, too, and has said why
        self._finish(told)

    def _finish(self, told: str) -> None:
        if told:
            say(told)
        self._end(LOST)
