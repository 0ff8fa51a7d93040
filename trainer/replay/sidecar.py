"""The sampler: a process beside the trainer that fills the replay pool. It shares nothing with it but files."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from trainer.data.shards import FULL_DISK
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.models.denoiser import Denoiser
from trainer.replay.decode import shard_name
from trainer.replay.manifest import Manifest
from trainer.replay.pool import encode, publish
from trainer.replay.request import ReplayRequest, read_request
from trainer.replay.state import read_json, read_state, write_json
from trainer.replay.teacher import open_teacher
from trainer.replay.trajectory import TrajectoryBatch, sample_trajectories
from trainer.run import RunDir

POLL_SECONDS = 0.2
BEAT_SECONDS = 5.0  # between two heartbeats while there is nothing to do
LOCK_SECONDS = 5.0  # for a sampler that is just ending to let go of its lock
FINISHED_SECONDS = 300.0  # a run that was finished before may be about to learn another task


@dataclass(frozen=True)
class Window:
    """Which shards may lie in the pool now: those from `released` on, as many as fit beside those `kept`."""

    released: int
    kept: range
    room: int

    def make(self, shards: int) -> range:
        return range(self.released, min(shards, self.released + self.room))

    def retire_for(self, shard: int, present: list[int]) -> list[int]:
        """What must go before `shard` is made, so that the pool never outgrows its limit."""
        return [
            other
            for other in present
            if other not in self.kept and (other <= shard - self.room or other >= self.released + self.room)
        ]


def pool_window(run: RunDir, request: ReplayRequest) -> Window:
    """The window as the trainer's progress file says; before there is one, the pool's beginning."""
    progress = read_json(run.replay_progress(request.task))
    low, high = progress.get("kept", [0, 0])
    kept = range(int(low), int(high))
    return Window(int(progress.get("released", 0)), kept, max(1, request.capacity - len(kept)))


class Sampler:
    """Makes the shards `worker`, `worker + workers`, ... of whatever pool the trainer asks for, in order."""

    def __init__(self, run: RunDir, worker: int, workers: int, device: torch.device, *, supervised: bool) -> None:
        self.run, self.worker, self.workers, self.device = run, worker, workers, device
        self.supervised = supervised  # then the supervisor ends it, not the run's state
        self.stop = threading.Event()
        self.began = time.time()
        self.made, self.evaluations, self.busy = 0, 0, 0.0
        self._beaten = 0.0
        self._warned: set[str] = set()
        self._teacher: tuple[str, Denoiser, NoiseSchedule] | None = None
        self._manifest: Manifest | None = None

    def serve(self) -> None:
        """Work until told to stop, or until the run is finished.

        Raises:
            UserError: a teacher or a pool that is not what the request says.
        """
        self.beat("waiting")
        while not self.stop.is_set():
            if self.run_is_finished():
                break
            request = self.current_request()
            shard = self.next_shard(request) if request else None
            if request is None or shard is None:
                self.beat("waiting", every=BEAT_SECONDS)
                self.stop.wait(POLL_SECONDS)
            else:
                self.make_shard(request, shard)
        self.beat("ended")

    def run_is_finished(self) -> bool:
        """Whether the run has ended; for a while one that had ended before is given the chance to go on."""
        state = read_state(self.run)
        if self.supervised or state is None or not state.finished:
            return False
        return state.time >= self.began or time.time() - self.began > FINISHED_SECONDS

    def current_request(self) -> ReplayRequest | None:
        """The request of the task that the trainer announced; None while there is none to serve."""
        state = read_state(self.run)
        if state is None or state.finished or not self.run.replay_request(state.task).exists():
            return None
        request = read_request(self.run.replay_request(state.task))
        directory = self.run.replay(request.task)
        if self._manifest is None or self._manifest.path.parent != directory:
            self._manifest = Manifest(directory)
            self._tidy(self._manifest)
        return request

    def next_shard(self, request: ReplayRequest) -> int | None:
        """The first shard of this worker's that the pool lacks and has room for; makes the room."""
        manifest = self._open_manifest()
        manifest.refresh()
        window = pool_window(self.run, request)
        for shard in window.make(request.shards):
            if shard % self.workers == self.worker and shard not in manifest.shards:
                self._retire(manifest, window.retire_for(shard, sorted(manifest.shards)))
                return shard
        return None

    def make_shard(self, request: ReplayRequest, shard: int) -> None:
        """Sample and publish one shard; leaves it when told to stop."""
        model, schedule = self._open_teacher(request)
        self.beat("sampling", every=BEAT_SECONDS)
        began = time.monotonic()
        batches = self._sample(model, schedule, request, shard)
        if batches is None:
            return
        encoded = encode(request, shard, batches)
        seconds = time.monotonic() - began
        evaluations = sum(batch.evaluations for batch in batches)
        while not self.stop.is_set():
            if shard not in pool_window(self.run, request).make(request.shards):
                return  # the trainer went on, or back, meanwhile
            try:
                publish(
                    self._open_manifest(),
                    request,
                    shard,
                    encoded,
                    evaluations=evaluations,
                    seconds=seconds,
                    worker=self.worker,
                )
            except OSError as error:
                self._pause(error)
                continue
            self.made, self.evaluations, self.busy = self.made + 1, self.evaluations + evaluations, self.busy + seconds
            self._warned.clear()
            self.beat("sampling")
            return

    def beat(self, status: str, every: float = 0.0) -> None:
        """Say in the heartbeat file that this sampler lives; on a full disk say nothing."""
        now = time.time()
        if now - self._beaten < every:
            return
        self._beaten = now
        rate = self.evaluations / self.busy if self.busy else 0.0
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": now,
            "status": status,
            "device": str(self.device),
            "shards": self.made,
            "evaluations": self.evaluations,
            "evaluations_per_second": round(rate, 1),
        }
        try:
            write_json(self.run.sampler(self.worker), content)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise

    def _sample(
        self, model: Denoiser, schedule: NoiseSchedule, request: ReplayRequest, shard: int
    ) -> list[TrajectoryBatch] | None:
        """Always the same micro-batches, so that a shard made again has the same bytes; None when told to stop."""
        first, count = shard * request.shard_trajectories, request.shard_trajectories
        batches: list[TrajectoryBatch] = []
        with torch.inference_mode():
            for start in range(0, count, request.sampler_batch):
                if self.stop.is_set():
                    return None
                stop = min(start + request.sampler_batch, count)
                indices = np.arange(first + start, first + stop, dtype=np.int64)
                batches.append(sample_trajectories(model, schedule, request, indices, self.device))
        return batches

    def _open_teacher(self, request: ReplayRequest) -> tuple[Denoiser, NoiseSchedule]:
        if self._teacher is None or self._teacher[0] != request.teacher_id:
            self._teacher = None  # the memory of the old one first
            self._teacher = (request.teacher_id, *open_teacher(self.run, request, self.device))
        return self._teacher[1], self._teacher[2]

    def _open_manifest(self) -> Manifest:
        assert self._manifest is not None
        return self._manifest

    def _tidy(self, manifest: Manifest) -> None:
        """After a crash: finish what it left half done among this worker's shards."""
        manifest.refresh()
        directory = manifest.path.parent
        for path in directory.glob(".replay-*.tmp"):
            if self._is_mine(path.name[1:].partition(".")[0]):
                path.unlink(missing_ok=True)
        for path in directory.glob("replay-*.tar"):
            if self._is_mine(path.stem) and int(path.stem.removeprefix("replay-")) not in manifest.shards:
                path.unlink(missing_ok=True)
        for shard in [shard for shard in manifest.shards if shard % self.workers == self.worker]:
            if not (directory / shard_name(shard)).exists():
                self._retire(manifest, [shard])

    def _is_mine(self, stem: str) -> bool:
        number = stem.removeprefix("replay-")
        return number.isdigit() and int(number) % self.workers == self.worker

    def _retire(self, manifest: Manifest, shards: list[int]) -> None:
        for shard in shards:
            (manifest.path.parent / shard_name(shard)).unlink(missing_ok=True)
            try:
                manifest.retire(shard)
            except OSError as error:
                self._pause(error)
        if shards:
            manifest.refresh()

    def _pause(self, error: OSError) -> None:
        """Wait for room on the disk, saying so once. Raises any other error."""
        if error.errno not in FULL_DISK:
            raise error
        self._warn(f"{self.run.root}: {error.strerror}: the sampler waits for room on the disk")
        self.beat("disk full")
        self.stop.wait(1.0)

    def _warn(self, text: str) -> None:
        if text in self._warned:
            return
        self._warned.add(text)
        try:
            print(f"sampler {self.worker}: {text}", file=sys.stderr, flush=True)
        except OSError:
            return  # the log lies on the same disk


def serve(run: RunDir, worker: int, workers: int, device: str, threads: int, *, supervised: bool = False) -> None:
    """Run sampler `worker` of `workers` for a run directory until the run is finished or SIGTERM comes.

    Raises:
        UserError: another sampler has this number, no such device, or a teacher that is not the request's.
    """
    assert 0 <= worker < workers, "checked by the command line"
    target = open_device(device)
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = False  # its choice of algorithm would differ from process to process
    with worker_lock(run.sampler_lock(worker), worker):
        sampler = Sampler(run, worker, workers, target, supervised=supervised)

        def stop(number: int, frame: FrameType | None) -> None:
            sampler.stop.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        sampler.serve()


def open_device(name: str) -> torch.device:
    """Raises UserError where this machine has no such device."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not on this machine ({reason})") from None
    return device


@contextmanager
def worker_lock(path: Path, worker: int) -> Iterator[None]:
    """One sampler per number and run directory. Raises UserError where another holds the lock."""
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + LOCK_SECONDS
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UserError(f"{path}: another sampler --worker {worker} serves this run directory") from None
                time.sleep(POLL_SECONDS)
        yield
