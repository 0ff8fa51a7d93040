"""Keeping samplers alive: a thread that starts a sampler, restarts it when it dies, and ends it with its process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from trainer.cli import USER_ERROR
from trainer.data.shards import FULL_DISK
from trainer.errors import say
from trainer.lifeline import tie_to_launcher
from trainer.replay.child import PARENT_VARIABLE, SIGNS_VARIABLE
from trainer.replay.devices import child_device
from trainer.replay.events import Event, EventLog
from trainer.replay.state import State, process_started, read_json, read_state, write_json
from trainer.replay.told import Told
from trainer.run import RunDir
from trainer.stop import STOP_SIGNALS

PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent
POLL_SECONDS = 0.2
LONGEST_LOOK = 2.0  # between two looks; a supervisor that was itself stopped for longer saw no silence
STOP_SECONDS = 3.0  # between SIGTERM and SIGKILL
JOIN_SECONDS = 20.0  # a child that a dead disk keeps from dying ends with this process
ANNOUNCE_SECONDS = 10.0  # after which clocks of two nodes are taken to disagree
BACKOFF_SECONDS, LONGEST_BACKOFF = 0.5, 30.0
# A sampler is no rank of anything.
_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "CROSS_", "GROUP_", "ROLE_")


def child_environment(environ: Mapping[str, str], threads: int) -> dict[str, str]:
    """The environment of a sampler: without the launcher's ranks, with this package on its path."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_RANK_VARIABLES)}
    paths = [str(PACKAGE_ROOT), *filter(None, [environ.get("PYTHONPATH")])]
    return kept | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        PARENT_VARIABLE: str(os.getpid()),
    }


class Ear:
    """A pipe through which a child gives signs of life, and how long it has given none, in seconds."""

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        self._silent, self._looked = 0.0, time.monotonic()

    def silence(self) -> float:
        now = time.monotonic()
        try:
            heard = bool(os.read(self.reader, 1 << 16))
        except BlockingIOError:
            heard = False
        self._silent = 0.0 if heard else self._silent + min(now - self._looked, LONGEST_LOOK)
        self._looked = now
        return self._silent

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Supervisor:
    """Runs sampler `worker` of `workers` as a child, from `start` to `stop`.

    The child has a session of its own, so that signals to the trainer's group leave it alone, and dies with the
    thread that supervises it. One that gives no sign of life for `hang_timeout` seconds is killed. One that dies is
    started again, each time later, until it has died more than `restarts` times in a row without publishing a shard;
    then it is given up and `replay.on_starved` decides. What happened stands in `run.supervisor(worker)` for every
    process to read, and among the run's events.
    """

    def __init__(
        self,
        run: RunDir,
        *,
        worker: int,
        workers: int,
        device: str,
        threads: int = 1,
        restarts: int = 3,
        hang_timeout: float = 300.0,
        attempt: int = 1,
        log: Path | None = None,
        backoff: float = BACKOFF_SECONDS,
        inherit_devices: bool = False,
        by_hand: bool = False,
    ) -> None:
        """`attempt` names the directory of the log, unless `log` does; `backoff` is the first pause before a restart,
        in seconds.

        `device` is cpu or the node's GPU N as cuda:N, which becomes all that the child sees; with `inherit_devices` the
        child sees what this process does, and `device` is meant so. A sampler started `by_hand` is at its end when the
        run is, and when it ends with an error that a person must mend.
        """
        self.run, self.worker, self.workers, self.device = run, worker, workers, device
        self.threads, self.restarts, self.hang_timeout, self.backoff = threads, restarts, hang_timeout, backoff
        self._child_device, self._shown = (device, {}) if inherit_devices else child_device(device, os.environ)
        self.log = log or run.teacher_log(attempt, worker)
        self.by_hand = by_hand
        self.events = EventLog(run, f"supervisor-{worker}")
        self.restarted = 0
        self.given_up = ""
        self.code = 0  # the last child's
        self.child: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"supervisor-{worker}", daemon=True)

    @property
    def at_work(self) -> bool:
        """Whether there is a child, or will be again."""
        return self._thread.is_alive()

    def start(self) -> None:
        self._report()
        self._thread.start()

    def stop(self) -> None:
        """End the child: SIGTERM, then SIGKILL. Repeatable."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)

    def _watch(self) -> None:
        """The child's parent thread: it must not end before the child does."""
        deaths = 0  # in a row, without a new shard
        while not self._stop.is_set():
            self.code = self._run_child()
            if self._stop.is_set() or (self.by_hand and self.code == 0):
                return
            if self.by_hand and self.code == USER_ERROR:
                self._give_up(self._last_word().removeprefix("error: "))
                return
            deaths = 0 if self._child_published() else deaths + 1
            if deaths > self.restarts:
                died = f"died {deaths} times in a row (last exit code {self.code})"
                died = died if deaths > 1 else f"died once (exit code {self.code})"
                self._give_up(f"sampler {self.worker} {died}, see {self.log}: {self._last_word()}")
                return
            self.restarted += 1
            self._note(Event.sampler_restart, code=self.code, deaths_in_a_row=deaths)
            self._stop.wait(min(self.backoff * 2 ** min(max(deaths - 1, 0), 10), LONGEST_BACKOFF))

    def _run_child(self) -> int:
        """Start the child and wait until it ends, by itself, because it hangs or because `stop` was called; its exit
        code."""
        with ExitStack() as stack:
            try:
                ear = Ear()
                stack.callback(ear.close)
                child = self._start_child(ear)
            except OSError as error:  # no more processes or descriptors: as if the child had died
                say(f"sampler {self.worker}: {error}")
                return error.errno or 1
            while child.poll() is None:
                if self._stop.wait(POLL_SECONDS):
                    return self._end_child(child)
                if ear.silence() > self.hang_timeout and child.poll() is None:
                    self._note(Event.sampler_hung, pid=child.pid, seconds=self.hang_timeout)
                    child.kill()
                    return child.wait()
            return child.returncode

    def _start_child(self, ear: Ear) -> subprocess.Popen[bytes]:
        environment = child_environment(os.environ, self.threads) | self._shown | {SIGNS_VARIABLE: str(ear.writer)}
        with ExitStack() as stack:
            try:
                self.log.parent.mkdir(parents=True, exist_ok=True)
                log: Any = stack.enter_context(self.log.open("ab"))
            except OSError as error:
                if error.errno not in FULL_DISK:
                    raise
                log = subprocess.DEVNULL
            child = subprocess.Popen(
                self._command(),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(ear.writer,),
            )
        self.child = child
        self._report()
        return child

    def _command(self) -> list[str]:
        return [
            *(sys.executable, "-m", "trainer.replay", "--run", str(self.run.root), "--device", self._child_device),
            *("--worker", str(self.worker), "--workers", str(self.workers), "--threads", str(self.threads)),
            *(["--by-hand"] if self.by_hand else []),
        ]

    def _end_child(self, child: subprocess.Popen[bytes]) -> int:
        child.terminate()
        try:
            return child.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            return child.wait()

    def _child_published(self) -> bool:
        beat = read_json(self.run.sampler(self.worker))
        shards = beat.get("shards")
        return self.child is not None and beat.get("pid") == self.child.pid and isinstance(shards, int) and shards > 0

    def _give_up(self, reason: str) -> None:
        self.given_up = reason
        self._note(Event.sampler_given_up, reason=reason)
        self._report()

    def _note(self, kind: Event, **details: Any) -> None:
        try:
            self.events.add(kind, worker=self.worker, **details)
        except OSError as error:  # what cannot be noted must not end the supervision
            say(f"{self.events.path}: {error.strerror}")

    def _last_word(self) -> str:
        """The last line of the child's log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - 4096))
                lines = file.read().decode(errors="replace").split("\n")
        except OSError:
            return "unreadable"
        return next((line.strip() for line in reversed(lines) if line.strip()), "empty")

    def _report(self) -> None:
        status = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": time.time(),
            "child": self.child.pid if self.child is not None else 0,
            "device": self.device,
            "restarts": self.restarted,
            "given_up": self.given_up,
        }
        try:
            write_json(self.run.supervisor(self.worker), status)
        except OSError as error:  # a full disk must not end the supervision
            say(f"{self.run.supervisor(self.worker)}: {error.strerror}")


def supervise_until_finished(
    run: RunDir,
    *,
    worker: int,
    workers: int,
    device: str,
    threads: int = 1,
    restarts: int = 3,
    hang_timeout: float = 300.0,
) -> None:
    """What a teacher rank does (`replay.placement=ranks`): keep its sampler alive until the run ends.

    Never fails: a launcher would take the trainer ranks down with it. Returns once `state.json` says, in this
    launch, that the run is finished, once the launcher is gone, or on a signal to stop, which it passes on to the
    trainer: it may have been meant for the job.
    """
    launch = Launch(run)
    for number in STOP_SIGNALS:
        signal.signal(number, launch.told.set)
    tie_to_launcher()
    with launch.told_on():
        while not launch.over() and not launch.announced():
            launch.told.wait(POLL_SECONDS)
        if launch.over():
            return
        supervisor = Supervisor(
            run,
            worker=worker,
            workers=workers,
            device=device,
            threads=threads,
            restarts=restarts,
            hang_timeout=hang_timeout,
            attempt=max(1, run.newest_attempt()),
            inherit_devices=True,  # the launcher has shown this rank its own
        )
        supervisor.start()
        while not launch.over():
            launch.told.wait(POLL_SECONDS)
    supervisor.stop()


class Launch:
    """Tells what the trainer says in this launch from what an earlier attempt left in `state.json`."""

    def __init__(self, run: RunDir) -> None:
        self.run, self.left = run, read_state(run)
        self.launcher = os.getppid()
        self.began = process_started(self.launcher)
        self.told = Told()
        self._waited_since = time.monotonic()

    @contextmanager
    def told_on(self) -> Generator[None, None, None]:
        """Afterwards, where this rank was told to stop, the trainer is, too."""
        yield
        if self.told.is_set():
            with suppress(OSError):  # never fails
                self.run.stop_wish.touch()

    def announced(self) -> bool:
        """Whether the trainer is at work, so its log directory exists. After a while an unfinished state will do,
        should the clocks of two nodes disagree."""
        state = read_state(self.run)
        if self._is_new(state):
            return True
        return state is not None and not state.finished and time.monotonic() - self._waited_since > ANNOUNCE_SECONDS

    def over(self) -> bool:
        """Whether this rank is no longer needed."""
        state = read_state(self.run)
        finished = state is not None and state.finished and self._is_new(state)
        return finished or self.told.is_set() or os.getppid() != self.launcher

    def _is_new(self, state: State | None) -> bool:
        return state is not None and (state.time >= self.began or state != self.left)
