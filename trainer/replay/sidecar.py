"""The sampler: a process beside the trainer that fills the replay pool. It shares nothing with it but files."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from trainer.allocator import keep_freed_memory
from trainer.data.shards import FULL_DISK
from trainer.diffusion.samplers import Predict
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.replay.devices import device_name
from trainer.replay.drawn import Clock, Drawn, Made, draw
from trainer.replay.events import Event, EventLog
from trainer.replay.graphs import GraphedPredict
from trainer.replay.labelled import Labeller, sample_labelled
from trainer.replay.lock import refuse, say, stand_by, worker_lock
from trainer.replay.manifest import Manifest
from trainer.replay.memory import free_memory, is_out_of_memory
from trainer.replay.pool import encode, publish
from trainer.replay.request import ReplayRequest, read_request
from trainer.replay.state import read_state, write_json
from trainer.replay.teacher import open_labellers, open_teacher
from trainer.replay.told import Told
from trainer.replay.trajectory import TrajectoryBatch, sample_trajectories
from trainer.replay.transport import open_pool
from trainer.replay.window import Filling, Limits, Progress, read_progress
from trainer.run import RunDir
from trainer.store import Interrupted, Pause

Make = Callable[[int], Made | None]  # a shard by its micro-batch; None when told to stop
POLL_SECONDS = 0.2
NICENESS = 10  # of a sampler on CPUs: a trainer that shares them waits in every operation for its slowest thread
BEAT_SECONDS = 5.0  # between two heartbeats that say the same
PAUSE_SECONDS = 1.0  # between two tries on a full disk
FINISHED_SECONDS = 300.0  # a run that was finished before may be about to learn another task
REREAD_SECONDS = 30.0  # between two looks of an idle sampler at the whole manifest


class Pool:
    """What a sampler knows of the pool that it fills."""

    def __init__(self, run: RunDir, request: ReplayRequest, worker: int, workers: int, pause: Pause) -> None:
        """`pause` is slept with while a store does not answer."""
        self.run, self.task, self.worker, self.workers = run, request.task, worker, workers
        self.store = request.store
        self.transport = open_pool(run, request, pause=pause)
        self.filling = Filling()
        self.progress = Progress()
        self.open()
        largest = min(request.sampler_batch, request.shard_trajectories)
        self.micro_batch = self.manifest.newest.get(worker, largest)  # smaller once memory was short

    def open(self) -> None:
        """Read the manifest from its start and tidy up.

        Lines that were damaged after they had been read count here, as they do not for a trainer that is started now.
        """
        self.manifest = Manifest(self.transport.open_journal())
        self.manifest.refresh()
        self.opened = time.monotonic()
        self._tidy()

    def refresh(self) -> None:
        self.manifest.refresh()
        self.progress = read_progress(self.run.replay_progress(self.task)) or self.progress

    def is_mine(self, shard: int) -> bool:
        return shard % self.workers == self.worker

    def present(self) -> set[int]:
        """Shards that take room, or are said to."""
        return self.transport.present() | self.manifest.shards.keys()

    def retire(self, shard: int) -> None:
        """Delete a shard. Raises OSError where that cannot be written down."""
        self.transport.delete(shard)
        if shard in self.manifest.shards:
            self.manifest.retire(shard, self.manifest.shards[shard].id)
            self.manifest.refresh()

    def _tidy(self) -> None:
        """After a crash: finish what it left half done among this worker's shards."""
        self.transport.tidy(self.is_mine)
        present = self.transport.present()
        for shard in filter(self.is_mine, present | self.manifest.shards.keys()):
            if (shard in self.manifest.shards) == (shard in present):
                continue
            try:
                self.retire(shard)
            except OSError as error:  # what is listed without a file is asked for again where it is needed
                if error.errno not in FULL_DISK:
                    raise


class Sampler:
    """Makes the shards `worker`, `worker + workers`, ... of whatever pool the trainer asks for, in order."""

    def __init__(
        self,
        run: RunDir,
        worker: int,
        workers: int,
        device: torch.device,
        *,
        by_hand: bool = False,
        alive: Callable[[], None] = lambda: None,
        stop: Told | None = None,
        ahead: bool | None = None,
    ) -> None:
        """`by_hand`: it ends with the run, not when its supervisor says so. `alive` is called at each sign of life.

        `ahead`: write a shard while the device samples the next one; None: where the device works by itself (CUDA).
        """
        self.run, self.worker, self.workers, self.device = run, worker, workers, device
        self.by_hand, self.alive, self.stop = by_hand, alive, stop or Told()
        self.device_name = device_name(device)
        self.events = EventLog(run, f"sampler-{worker}")
        self.began = time.time()
        self.made, self.evaluations, self.busy = 0, 0, 0.0
        self._beaten, self._status = 0.0, ""
        self._paused = False  # the disk is full, and that was said
        self._teacher: tuple[str, Predict, NoiseSchedule] | None = None
        self._labellers: tuple[tuple[str, str], list[Labeller]] | None = None
        self._lacking = set[tuple[int, int]]()  # tasks and classes that were told of
        self._pool: Pool | None = None
        self._ahead = device.type == "cuda" if ahead is None else ahead
        self._drawn: Drawn | None = None  # sampled, or being sampled, and not published yet

    def serve(self) -> None:
        """Work until told to stop, or until the run is finished.

        Raises:
            UserError: a teacher or a pool that is not what the request says.
        """
        try:
            self._serve()
        except Interrupted:  # told to stop while a store did not answer
            self._drawn = None
        self.beat("ended")

    def _serve(self) -> None:
        while not self.stop.is_set() and not self.run_is_finished():
            request = self.current_request()
            shard = self.next_shard(request) if request else None
            if request is not None and shard is not None:
                self.make_shard(request, shard)
            elif self._drawn is not None:
                self.finish_shard()
            else:
                self._rest(request)

    def run_is_finished(self) -> bool:
        """Whether the run has ended; for a while one that had ended before is given the chance to go on."""
        state = read_state(self.run)
        if not self.by_hand or state is None or not state.finished:
            return False
        return state.time >= self.began or time.time() - self.began > FINISHED_SECONDS

    def current_request(self) -> ReplayRequest | None:
        """The request of the task that the trainer announced; None while there is none to serve."""
        state = read_state(self.run)
        if state is None or state.finished or not self.run.replay_request(state.task).exists():
            return None
        request = read_request(self.run.replay_request(state.task))
        if self._pool is None or (self._pool.task, self._pool.store) != (request.task, request.store):
            self._pool = Pool(self.run, request, self.worker, self.workers, self._pause_for_store)
        return request

    def next_shard(self, request: ReplayRequest) -> int | None:
        """The first shard of this worker's that the pool lacks and that is to be made now."""
        pool = self._open_pool()
        pool.refresh()
        wanted = pool.filling.wanted(pool.manifest.shards.keys(), pool.progress, Limits.of(request))
        drawn = self._drawn.shard if self._drawn is not None else None
        return next((shard for shard in wanted if pool.is_mine(shard) and shard != drawn), None)

    def make_shard(self, request: ReplayRequest, shard: int) -> None:
        """Sample one shard, and publish it or, working ahead, the one before; leaves it when told to stop."""
        self.beat("sampling")
        make, teachers = self._maker(request, shard)
        clock = Clock(self.device)
        try:
            sampled = self._sample(make, teachers, shard)
        finally:
            self.finish_shard()  # the one before, where the first micro-batch of this one did not come so far
        if sampled is None:
            return
        self._drawn = draw(request, shard, *sampled, clock)
        if not self._ahead:
            self.finish_shard()

    def finish_shard(self) -> None:
        """Publish what is sampled and not published yet."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None:
            self._publish(drawn)

    def _publish(self, drawn: Drawn) -> None:
        """Wait for the device, write the shard and list it; leaves it when told to stop, or when it came too late."""
        request, shard = drawn.request, drawn.shard
        seconds = drawn.clock.wait()
        pool, limits = self._open_pool(), Limits.of(request)
        if request.task != pool.task:
            return  # the trainer has learnt that task
        made = drawn.made
        encoded = encode(request, shard, made.batches)
        evaluations = sum(batch.evaluations for batch in made.batches)
        while not self.stop.is_set():
            pool.refresh()
            if shard not in limits.room(pool.progress):
                return  # the trainer went on, or back, meanwhile
            try:
                self._make_room(pool, limits, shard)
                publish(
                    pool.transport,
                    pool.manifest,
                    request,
                    shard,
                    encoded,
                    micro_batch=drawn.micro_batch,
                    evaluations=evaluations,
                    seconds=seconds,
                    worker=self.worker,
                    rejected=made.rejected,
                    lacking=made.lacking,
                )
            except OSError as error:
                self._pause(error)
                continue
            self.made, self.evaluations, self.busy = self.made + 1, self.evaluations + evaluations, self.busy + seconds
            self._paused = False
            self._tell_lacking(request, made)
            self.events.flush()
            self.beat("sampling", news=True)
            return

    def _tell_lacking(self, request: ReplayRequest, made: Made) -> None:
        """Say it once of each task and class that a teacher does not make as often as it was asked to."""
        for label, count in made.lacking.items():
            if (request.task, label) in self._lacking:
                continue
            self._lacking.add((request.task, label))
            details = {"task": request.task, "class": label, "trajectories": count, "filled": request.missing}
            self.events.add(Event.missing_class, worker=self.worker, **details)
            say(
                self.worker,
                f"task {request.task}: too few images of class {label}: {count} of a shard's trajectories are filled "
                f"otherwise (jdcl.missing={request.missing}); metrics.json counts them all",
            )

    def beat(self, status: str, *, news: bool = False) -> None:
        """Give a sign of life, and now and then, or where there are news, write it to the heartbeat file.

        On a full disk the file says nothing.
        """
        self.alive()
        now = time.time()
        if status == self._status and not news and abs(now - self._beaten) < BEAT_SECONDS:
            return
        self._beaten, self._status = now, status
        rate = self.evaluations / self.busy if self.busy else 0.0
        content = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": now,
            "status": status,
            "device": str(self.device),
            "device_name": self.device_name,
            "shards": self.made,
            "evaluations": self.evaluations,
            "evaluations_per_second": round(rate, 1),
        }
        try:
            write_json(self.run.sampler(self.worker), content)
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise

    def _rest(self, request: ReplayRequest | None) -> None:
        """Nothing to do for the moment: say why, and wait a little."""
        pool, status = self._pool, "waiting"
        if request is not None and pool is not None:
            still = range(max(pool.progress.released, pool.progress.used or 0), request.shards)
            missing = any(pool.is_mine(shard) and shard not in pool.manifest.shards for shard in still)
            status = "resting" if missing else "complete"
            if time.monotonic() - pool.opened > REREAD_SECONDS:
                pool.open()
        self.beat(status)
        self.stop.wait(POLL_SECONDS)

    def _maker(self, request: ReplayRequest, shard: int) -> tuple[Make, list[Predict]]:
        """What makes a shard with a micro-batch, and the teachers that it asks."""
        if request.labelled:
            labellers = self._open_labellers(request)
            label = partial(self._label_in, labellers, request, shard)
            return label, [labeller.predict for labeller in labellers]
        predict, schedule = self._open_teacher(request)
        return partial(self._sample_in, predict, schedule, request, shard), [predict]

    def _sample(self, make: Make, teachers: Sequence[Predict], shard: int) -> tuple[Made, int] | None:
        """The trajectories of a shard and the micro-batch that they were sampled in; None when told to stop.

        A shard made again is sampled as it was before, so it has the same bytes. Where memory is short the micro-batch
        is halved, also for later shards. Raises what the allocator did when one trajectory alone is too much.
        """
        pool = self._open_pool()
        micro_batch = pool.manifest.micro_batches.get(shard, pool.micro_batch)
        while True:
            try:
                made = make(micro_batch)
                return None if made is None else (made, micro_batch)
            except (RuntimeError, MemoryError) as error:
                if micro_batch == 1 or not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            for teacher in teachers:
                if isinstance(teacher, GraphedPredict):
                    teacher.forget()
            free_memory(self.device)  # here, not in the handler: the error's traceback holds on to tensors
            smaller = micro_batch // 2
            pool.micro_batch = min(pool.micro_batch, smaller)
            sizes = {"micro_batch": micro_batch, "next_micro_batch": smaller}
            self.events.add(Event.out_of_memory, worker=self.worker, shard=shard, **sizes, reason=reason)
            say(
                self.worker,
                f"out of memory with {micro_batch} trajectories at once; going on with {smaller} ({reason})",
            )
            micro_batch = smaller

    def _sample_in(
        self, predict: Predict, schedule: NoiseSchedule, request: ReplayRequest, shard: int, micro_batch: int
    ) -> Made | None:
        first, count = shard * request.shard_trajectories, request.shard_trajectories
        batches: list[TrajectoryBatch] = []
        with torch.inference_mode():
            for start in range(0, count, micro_batch):
                if self.stop.is_set():
                    return None
                stop = min(start + micro_batch, count)
                indices = np.arange(first + start, first + stop, dtype=np.int64)
                batches.append(sample_trajectories(predict, schedule, request, indices, self.device, self._sampling))
                self.finish_shard()  # the one before is written while the device works on this one
        return Made(batches)

    def _label_in(
        self, teachers: Sequence[Labeller], request: ReplayRequest, shard: int, micro_batch: int
    ) -> Made | None:
        def pause() -> bool:
            self.beat("sampling")
            self.finish_shard()
            return self.stop.is_set()

        with torch.inference_mode():
            return sample_labelled(teachers, request, shard, micro_batch, self.device, pause, self._sampling)

    def _sampling(self) -> None:
        self.beat("sampling")

    def _open_teacher(self, request: ReplayRequest) -> tuple[Predict, NoiseSchedule]:
        if self._teacher is None or self._teacher[0] != request.teacher_id:
            self._teacher = None  # the memory of the old one first
            self._teacher = (request.teacher_id, *open_teacher(self.run, request, self.device))
        return self._teacher[1], self._teacher[2]

    def _open_labellers(self, request: ReplayRequest) -> list[Labeller]:
        wanted = request.teacher_id, request.local_teacher_id
        if self._labellers is None or self._labellers[0] != wanted:
            self._labellers = None  # the memory of the old ones first
            self._labellers = wanted, open_labellers(self.run, request, self.device)
        return self._labellers[1]

    def _open_pool(self) -> Pool:
        assert self._pool is not None
        return self._pool

    def _make_room(self, pool: Pool, limits: Limits, shard: int) -> None:
        present = pool.present()
        for other in limits.surplus(shard, present, pool.progress):
            pool.retire(other)
        if shard not in pool.manifest.shards:
            pool.transport.delete(shard)  # corrupt, or never listed: not beside the new one

    def _pause_for_store(self, seconds: float) -> bool:
        self.beat("waiting for the store")
        return self.stop.wait(seconds)

    def _pause(self, error: OSError) -> None:
        """Wait for room on the disk, saying so once. Raises any other error."""
        if error.errno not in FULL_DISK:
            raise error
        if not self._paused:
            self._paused = True
            self.events.add(Event.disk_full, worker=self.worker, reason=error.strerror)
            say(self.worker, f"{self.run.root}: {error.strerror}: waits for room on the disk")
        self.beat("disk full")
        self.stop.wait(PAUSE_SECONDS)


def serve(
    run: RunDir,
    worker: int,
    workers: int,
    device: str,
    threads: int,
    *,
    by_hand: bool = False,
    alive: Callable[[], None] = lambda: None,
) -> None:
    """Run sampler `worker` of `workers` for a run directory until SIGTERM comes, or `by_hand` until the run ends.

    Where another sampler has this number it stands by and takes over when that one has ended.

    Raises:
        UserError: no such device, a teacher that is not the request's, or, `by_hand`, a number that is taken.
    """
    assert 0 <= worker < workers, "checked by the command line"
    stop = Told()
    signal.signal(signal.SIGTERM, stop.set)
    signal.signal(signal.SIGINT, stop.set)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a scheduler's word to all processes of a job; the trainer heeds it
    path = run.sampler_lock(worker)
    wait = refuse(path, worker, stop) if by_hand else stand_by(worker, stop, alive)
    with worker_lock(path, wait) as held:
        if held:
            target = open_device(device)
            torch.set_num_threads(threads)
            if target.type == "cpu":
                keep_freed_memory()
                os.nice(NICENESS)
            elif target.index is not None:
                torch.cuda.set_device(target)  # events and graph captures take the current device's stream
            torch.backends.cudnn.benchmark = False  # its choice of algorithm would differ from process to process
            Sampler(run, worker, workers, target, by_hand=by_hand, alive=alive, stop=stop).serve()


def open_device(name: str) -> torch.device:
    """Raises UserError where this machine has no such device."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name}: not on this machine ({reason})") from None
    return device
