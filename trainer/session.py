"""From a configuration to a finished run: who this process is, what is checked, what is started and ended."""

from __future__ import annotations

import gc
import os
import time
import traceback
from contextlib import ExitStack, suppress
from pathlib import Path

import torch

from trainer.allocator import keep_freed_memory
from trainer.cli import USER_ERROR
from trainer.compile_cache import use_compile_cache
from trainer.config import AUTO, Config, Placement
from trainer.data.remote import local_root, remote_set
from trainer.data.shards import read_card
from trainer.errors import ConfigError, ToldElsewhere, UserError, disk_error, say
from trainer.judge import Judge
from trainer.lifeline import tie_to_launcher
from trainer.loop import Trainer
from trainer.micro_batch import settle
from trainer.preflight import check_run, lock_run, preflight, resolve_root
from trainer.replay.devices import choose_devices, node_gpus, visible_gpus
from trainer.replay.events import Event
from trainer.replay.state import read_state, write_state
from trainer.replay.supervisor import Supervisor, supervise_until_finished
from trainer.report.source import is_current
from trainer.run import RunDir
from trainer.settings import check_world
from trainer.standing import finished_result
from trainer.steps import images_of_task
from trainer.stop import Stopped, StopRequest
from trainer.store import is_url
from trainer.tracking.table import print_result
from trainer.tracking.tracker import Tracker, open_tracker
from trainer.world import PortTaken, Role, World, join_world, leave_world, split_ranks

FAILED = 1


def train(config: Config) -> int:
    """Train a configuration on the ranks that a launcher started, this one among them. Returns the exit code.

    Raises:
        UserError: before the first step, for what a person can mend.
    """
    began = time.monotonic()
    cuda = torch.cuda.is_available()
    run = RunDir(Path(config.run.dir) / config.run.name)
    use_compile_cache(run, config.train.compile_cache)
    teachers = config.replay.devices_per_node if config.teacher_ranks else 0
    role = split_ranks(os.environ, teachers)
    if role.kind == "teacher":
        return teach(config, run, role, cuda)
    if not cuda:
        keep_freed_memory()
    check_world(config, role.count, cuda)
    resolve_root(config)
    tie_to_launcher()
    refusal = refused_lock(run) if role.index == 0 else None
    if role.count == 1 and prepare(config, run, refusal):
        return 0
    try:
        world = join_world(teachers, config.train.threads or trainer_threads(config, role), config.cluster.timeout)
    except RuntimeError as error:
        if refusal is not None:  # the run that holds the directory holds the port, too
            raise refusal from None
        if isinstance(error, PortTaken):
            say(f"error: {error}")
            return FAILED
        raise
    code = FAILED
    try:
        code = work(config, run, world, began, refusal)
    finally:  # a rank that fails must end at once, or the others wait for it
        if code == FAILED:
            traceback.print_exc()
        leave_world(world, code)


def refused_lock(run: RunDir) -> UserError | None:
    """Hold the run directory, or why that cannot be."""
    try:
        lock_run(run)
    except UserError as error:
        return error
    return None


def prepare(config: Config, run: RunDir, refusal: UserError | None) -> bool:
    """What the main rank does before anything is learnt; whether the run is finished already, and its result printed.

    Args:
        refusal: of the run directory's lock.

    Raises:
        UserError: what a person can mend.
    """
    if refusal is not None:
        raise refusal
    try:
        done = finished_result(run, config)
        if done is None:
            preflight(config, run)
            return False
        check_run(config, run)
        write_state(run, len(config.data.tasks), finished=True)
        if not is_current(run):  # killed before it was drawn, or of a version without
            show_report(run, Tracker())
    except OSError as error:
        raise disk_error(error) from None
    print_result(done, picture_paths(run, len(config.data.tasks)))
    return True


def work(config: Config, run: RunDir, world: World, began: float, refusal: UserError | None) -> int:
    """Check, learn and judge; the exit code.

    Args:
        began: when this process did, by time.monotonic().
        refusal: of the run directory's lock, on the main rank.
    """
    try:
        # Several ranks have met before: those of other hosts must hear of a refusal, and wait while data is built.
        if world.size == 1 or not world.any(bool(world.on_main(lambda: prepare(config, run, refusal)))):
            learn(config, run, world, began)
        return 0
    except Stopped as stopped:
        if world.is_main:
            end_work(run)
            with suppress(OSError):  # all is saved, also where nobody listens any more
                print(f"{run.root}: {stopped}", flush=True)
        return 0
    except ToldElsewhere:
        return USER_ERROR
    except (UserError, OSError) as error:
        told = disk_error(error) if isinstance(error, OSError) else error
        rank = "" if world.is_main else f" (rank {world.rank})"
        say(f"error{rank}: {' '.join(str(told).split())}")
        return USER_ERROR


def learn(config: Config, run: RunDir, world: World, began: float) -> None:
    """Learn and judge all tasks, with the sidecar beside it.

    Raises:
        Stopped: after a signal, with everything saved.
        UserError: what a person can mend.
    """
    stop = StopRequest(run.stop_wish if world.is_main else None)
    with ExitStack() as stack:
        images = [images_of_task(config, task) for task in range(1, len(config.data.tasks) + 1)]
        tracker = world.on_main(lambda: open_tracker(run, config, images)) or Tracker()
        stack.enter_context(tracker)
        attempt = world.on_main(lambda: next_attempt(run)) or 0
        for supervisor in world.on_main(lambda: supervisors(config, run, world, attempt)) or ():
            supervisor.start()
            stack.callback(supervisor.stop)
        names = read_card(local_root(config.data)).classes
        gc.disable()  # the loop collects at fixed steps, the same on all ranks
        judge = Judge(config, run, world, tracker, names, stop.interrupting)
        world.on_main(lambda: refuse_shared_gpu(config, world))
        settle(config, run, world, tracker.note)
        trainer = Trainer(config, run, world, tracker, judge, stop, began)
        stack.callback(trainer.close)
        if world.is_main and is_url(config.data.root):
            outage = remote_set(config.data).outage
            outage.ended = lambda seconds: trainer.events.add(Event.store_away, seconds=seconds)
        content = trainer.fit()
        world.on_main(lambda: write_state(run, len(config.data.tasks), finished=True))
        world.on_main(lambda: show_report(run, tracker))
    if world.is_main:
        print_result(content, picture_paths(run, len(config.data.tasks)))


def show_report(run: RunDir, tracker: Tracker) -> None:
    """Draw the report of a run that is finished: metrics.json is there, and no failure here takes it back."""
    from trainer.report.page import write_report  # matplotlib: half a second that no first step waits for

    tracker.activity("drawing the report")
    for name, path in write_report(run).figures.items():
        tracker.image(f"report/{name}", path)


def picture_paths(run: RunDir, tasks: int) -> dict[str, Path]:
    """What a person looks at in a finished run, by what it shows."""
    return {
        "samples": run.samples(tasks),
        "history": run.history,
        "report": run.report_page,
        "result": run.metrics,
    }


def end_work(run: RunDir) -> None:
    """Tell the samplers that this attempt is over; those of a job also end with it, should the disk be full."""
    state = read_state(run)
    with suppress(OSError):
        write_state(run, state.task if state else 1, finished=True)


def teach(config: Config, run: RunDir, role: Role, cuda: bool) -> int:
    """The life of a teacher rank: keep a sampler going until the run is finished."""
    if finished_result(run, config) is not None:
        return 0
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    supervise_until_finished(
        run,
        worker=role.index,
        workers=role.count,
        device=device,
        threads=config.replay.threads,
        restarts=config.replay.restarts,
        hang_timeout=config.replay.hang_timeout,
    )
    return 0


def supervisors(config: Config, run: RunDir, world: World, attempt: int) -> list[Supervisor]:
    """The sidecars that the main rank keeps going itself (`replay.placement=subprocess`)."""
    if not config.needs_teacher or config.replay.placement is not Placement.subprocess or len(config.data.tasks) < 2:
        return []
    return [
        Supervisor(
            run,
            worker=worker,
            workers=config.replay.workers,
            device=sidecar_device(config, world, worker),
            threads=config.replay.threads,
            restarts=config.replay.restarts,
            hang_timeout=config.replay.hang_timeout,
            attempt=attempt,
        )
        for worker in range(config.replay.workers)
    ]


def sidecar_device(config: Config, world: World, worker: int) -> str:
    """The device of a sidecar, as the node numbers its GPUs. Raises ConfigError for one that is not there."""
    trainers = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    gpus = node_gpus() if world.device.type == "cuda" else 0
    replay = config.replay
    return choose_devices(replay.device, replay.workers, trainers, gpus, visible_gpus(os.environ))[worker]


def refuse_shared_gpu(config: Config, world: World) -> None:
    """Raises ConfigError where a sampler will take memory that a trial for `train.micro_batch=auto` finds free."""
    trainers = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
    replaying = config.needs_teacher and len(config.data.tasks) > 1
    if config.train.micro_batch != AUTO or world.device.type != "cuda" or not replaying:
        return
    if config.replay.placement is Placement.subprocess:
        own = {f"cuda:{gpu}" for gpu in (visible_gpus(os.environ) or range(node_gpus()))[:trainers]}
        shared = own & {sidecar_device(config, world, worker) for worker in range(config.replay.workers)}
        if shared:
            raise ConfigError(
                f"train.micro_batch=auto: a sampler will share {min(shared)} with a trainer, and how much of its "
                "memory that takes is not known; give train.micro_batch a number, or the sampler another replay.device"
            )


def trainer_threads(config: Config, role: Role) -> int:
    """CPU threads of a trainer rank: this node's cores, less the teachers', shared out between its trainer ranks."""
    cores = len(os.sched_getaffinity(0))
    local = int(
        role.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1
    )
    busy = 0
    if config.needs_teacher and config.replay.placement is Placement.subprocess and not torch.cuda.is_available():
        busy = config.replay.workers * config.replay.threads
    elif config.teacher_ranks:
        busy = config.replay.devices_per_node * config.replay.threads
    return max(1, (cores - busy) // local)


def next_attempt(run: RunDir) -> int:
    """The number of this start of the run, from 1; makes its log directory."""
    attempt = 1
    while run.log(attempt).exists():
        attempt += 1
    run.log(attempt).mkdir(parents=True)
    return attempt
