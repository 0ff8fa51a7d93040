"""Contenders that take turns on one device, each in a process of its own.

A process of its own keeps their memory, their compiled graphs and their failures apart, and lets them be built side by
side; the turns (A B C, B C A, ...) let a change of the machine's speed meet all alike. Only one of them computes at a
time. A contender keeps calling `Turns.step_done`, also from deep within another loop, so that the program's own
training loop is timed as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import import_module
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist
from claims import WrongResult, synchronise
from torch import Tensor

from speed.profile import Marks, Profile
from trainer.lifeline import die_with_parent

# Imported before a contender is built, on a CPU before its process is forked; what is not there is passed over.
HEAVY = (
    *("deepspeed", "deepspeed.module_inject.auto_ep_layer", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.runtime.superoffload.superoffload_stage3", "diffusers", "speed.peers", "speed.sampling"),
)
RANK_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FIRST_STEPS = 3  # whose losses are compared
END_SECONDS = 20.0
Answer = dict[str, Any]
Steps = Generator[None, None, Answer]


class Over(Exception):
    """Nobody asks for another step."""


class ContenderFailed(Exception):
    """A contender raised an error, died or did not answer; the message is one line."""


class Turns:
    """A contender's side: tells it when to take a step, and takes the time."""

    def __init__(self, connection: Connection[Any, Any], device: torch.device) -> None:
        self.device = device
        self.facts: dict[str, Any] = {}  # told with the next answer
        self.waited = 0.0  # seconds in the present round that the contender says it waited for data
        self.marks = Marks(device)
        self._first: list[tuple[Tensor, Tensor | None]] = []
        self._connection = connection
        self._commands = self._serve()

    def start(self) -> None:
        """Say that everything is built, and return when the first step is wanted. Raises Over."""
        self.step_done()

    def step_done(self) -> None:
        """After each step; returns when the next one is wanted. Raises Over."""
        if next(self._commands, self) is self:
            raise Over

    def note(self, loss: Tensor, grad_norm: Tensor | None = None) -> None:
        """The loss of a step and its gradient's norm before clipping, on the device; the first few are kept."""
        if len(self._first) < FIRST_STEPS:
            self._first.append((loss.detach().clone(), None if grad_norm is None else grad_norm.detach().clone()))

    def _serve(self) -> Generator[None, None, None]:
        self._answer({})
        while True:
            command = self._connection.recv()
            match command.pop("do"):
                case "warm":
                    self._answer((yield from self._warm(**command)))
                case "round":
                    self._answer((yield from self._round(**command)))
                case "profile":
                    self._answer((yield from self._profile(**command)))
                case _:
                    return

    def _answer(self, answer: Answer) -> None:
        self._connection.send(answer | {"facts": self.facts})
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # for the next contender

    def _warm(self, steps: int) -> Steps:
        """The seconds of each step: compilers work in the first."""
        seconds = list[float]()
        for _ in range(steps):
            began = time.perf_counter()
            yield
            self._wait()
            seconds.append(time.perf_counter() - began)
        losses = [loss.item() for loss, _ in self._first]
        norms = [norm.item() for _, norm in self._first if norm is not None]
        return {"seconds": seconds, "losses": losses, "grad_norms": norms}

    def _round(self, settle: int, steps: int) -> Steps:
        for _ in range(settle):
            yield
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.waited = 0.0
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            yield
        issued = time.perf_counter() - began
        self._wait()
        answer = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0
        return answer | {"issued": issued, "waited": self.waited, "peak_bytes": peak, "steps": steps}

    def _profile(self, steps: int) -> Steps:
        self._wait()
        self.marks.on()
        for _ in range(steps):
            yield
        sections = self.marks.off()
        with Profile(self.device) as profile:
            for _ in range(steps):
                yield
            self._wait()
        return {"sections_ms": sections, **profile.totals(steps)}

    def _wait(self) -> None:
        synchronise(self.device)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()


@dataclass(frozen=True)
class Entry:
    """A contender: `build(turns, **arguments)` makes it and takes steps until `Over`; one process for each rank.

    `eager`: nothing of it is compiled.
    """

    build: Callable[..., None]
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])
    ranks: int = 1
    eager: bool = False


class Contender:
    """The asking side: the processes of one contender, which import what they need and wait for `build`."""

    def __init__(self, name: str, entry: Entry, device: str) -> None:
        self.name = name
        if device == "cuda":  # which does not survive a fork
            context = multiprocessing.get_context("spawn")
        else:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(list(HEAVY))
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection[Any, Any]] = []
        port = free_port() if entry.ranks > 1 else 0
        for rank in range(entry.ranks):
            ours, theirs = context.Pipe()
            place = rank_environment(rank, entry.ranks, port) if entry.ranks > 1 else {}
            process = context.Process(target=_run, args=(theirs, entry, device, place), daemon=False)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def ask(self, do: str, limit: float, **arguments: Any) -> Answer:
        """Have something done and wait for the answer; of several ranks the slowest's.

        Raises:
            ContenderFailed: with the reason in one line.
            WrongResult: it computes something else than it should.
        """
        with _failing(self.name):
            for connection in self._connections:
                connection.send({"do": do, **arguments})
        return self._answer(limit)

    def build(self, limit: float) -> Answer:
        """Have it built; what it says when it is ready for its first step. Raises as `ask`."""
        return self.ask("build", limit)

    def _answer(self, limit: float) -> Answer:
        deadline, answers = time.monotonic() + limit, list[Answer]()
        for connection in self._connections:
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                raise ContenderFailed(f"{self.name}: no answer within {limit:.0f} s")
            with _failing(self.name):
                answers.append(connection.recv())
            if "wrong" in answers[-1]:
                raise WrongResult(f"{self.name}: {answers[-1]['wrong']}")
            if "error" in answers[-1]:
                raise ContenderFailed(f"{self.name}: {answers[-1]['error']}")
        return answers[0] if "steps" not in answers[0] else max(answers, key=lambda answer: answer["seconds"])

    def close(self, patience: float = END_SECONDS) -> None:
        """End its processes; those that have not ended after `patience` seconds are killed."""
        for connection in self._connections:
            with suppress(OSError):
                connection.send({"do": "end"})
        for process in self._processes:
            process.join(patience)
            if process.exitcode is None:
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()


@contextmanager
def _failing(name: str) -> Generator[None, None, None]:
    """A broken pipe as `ContenderFailed`."""
    try:
        yield
    except (EOFError, OSError) as error:
        raise ContenderFailed(f"{name}: its process died") from error


def rank_environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher tells rank `rank` of `size` on this machine."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_PORT": port}
    return {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(connection: Connection[Any, Any], entry: Entry, device: str, place: Mapping[str, str]) -> None:
    """A contender's process, from start to end."""
    die_with_parent(os.getppid())
    os.dup2(2, 1)  # what libraries print must not mix with the table
    for name in RANK_NAMES:
        os.environ.pop(name, None)
    os.environ.update(place)
    code = 1
    for name in HEAVY:
        with suppress(ImportError):
            import_module(name)
    if device == "cpu":
        torch.set_num_threads(1)  # until the contender decides otherwise
    try:
        if connection.recv()["do"] != "build":
            raise Over
        own = torch.device(device, 0) if device == "cuda" else torch.device(device)
        entry.build(Turns(connection, own), **entry.arguments)
        code = 0
    except Over:
        code = 0
    except WrongResult as error:
        connection.send({"wrong": str(error)})
    except Exception as error:  # noqa: BLE001  whatever it is, the one who asked has to know
        traceback.print_exc()
        with suppress(OSError):
            connection.send({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
    os._exit(code)  # past the shutdown of process groups, in which threads abort now and then
