"""What may befall a job over two hosts, and how long afterwards each part of it has ended."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

from .hosts import HOSTS
from .jobs import SCRIPTS, Job, Place

DEEPSPEED = str(SCRIPTS / "deepspeed")
TABLE: list[str] = []  # a line for each fault, of all tests of a session


@dataclass(frozen=True)
class Ended:
    """Seconds after a fault until nothing of the job ran on each host, None where something still did, and the
    command's exit code, None where it went on."""

    seconds: dict[str, float | None]
    command: float | None
    code: int | None

    @property
    def last(self) -> float | None:
        """Seconds until everything had ended; None where something went on."""
        times = [*self.seconds.values(), self.command]
        return None if None in times else max(time for time in times if time is not None)

    def line(self, name: str) -> str:
        """For the table."""
        parts = {**self.seconds, "deepspeed": self.command}
        told = "  ".join(
            f"{part} {'runs on' if time is None else f'{time:.1f}'}".ljust(18) for part, time in parts.items()
        )
        return f"{name:<38}{told}exit {'-' if self.code is None else self.code}"


def kill_worker(place: Place) -> None:
    """kill -9 of the rank on the second host."""
    _signal(place, "node2", signal.SIGKILL, "--local_rank=")


def kill_host(place: Place) -> None:
    """The second host loses its power."""
    place.hosts.kill_host("node2")


def kill_main_host(place: Place) -> None:
    """The first host, with the main rank and the `deepspeed` command, loses its power."""
    place.hosts.kill_host("node1")


def cut(place: Place) -> None:
    """The cable between the hosts is pulled."""
    place.hosts.cut("node2")


def terminate(place: Place) -> None:
    """SIGTERM to the `deepspeed` command."""
    _signal(place, "node1", signal.SIGTERM, f"{DEEPSPEED} ")


def kill_command(place: Place) -> None:
    """kill -9 of the `deepspeed` command alone: pdsh, its child, lives on."""
    _signal(place, "node1", signal.SIGKILL, f"{DEEPSPEED} ")


def lose_connections(place: Place) -> None:
    """kill -9 of the `deepspeed` command, pdsh and its ssh clients, as when the host that started the job is gone."""
    _signal(place, "node1", signal.SIGKILL, f"{DEEPSPEED} ", "pdsh -S", "ssh -oConnect")


def suffer(place: Place, job: Job, fault: Callable[[Place], None], limit: float) -> Ended:
    """Do something to a job, and watch for up to `limit` seconds how it ends."""
    began = time.monotonic()
    fault(place)
    seconds: dict[str, float | None] = dict.fromkeys(HOSTS)
    command: float | None = None
    while time.monotonic() - began < limit and (None in seconds.values() or command is None):
        for host in HOSTS:
            if seconds[host] is None and not (place.hosts.is_up(host) and place.left(host)):
                seconds[host] = time.monotonic() - began
        if command is None and job.process.poll() is not None:
            command = time.monotonic() - began
        time.sleep(0.1)
    return Ended(seconds, command, job.process.poll())


def _signal(place: Place, host: str, number: int, *words: str) -> None:
    found = place.processes(host, *words)
    assert found, f"no {' or '.join(words)} on {host}"
    for pid in found:
        os.kill(pid, number)
