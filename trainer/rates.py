"""How many teacher devices a trainer device needs so that it never waits for replay, from measured rates.

A trainer device that learns r real images a second takes r R / G replay points (R points beside G images in each step),
and each point costs E / (P U) evaluations of the teacher: E in a trajectory, of which P points are stored and each is
used U times. A teacher device makes e evaluations a second, so a trainer device needs r R / G * E / (P U) / e of them.
The rates come from the log and the manifests of an earlier run, or from a trial here.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from trainer.allocator import keep_freed_memory
from trainer.config import AUTO, Config, OwnPoints, Placement, Points
from trainer.data.batch import Examples
from trainer.diffusion.schedules import make_schedule
from trainer.engine import DTYPES, Engine
from trainer.errors import ConfigError, UserError, one_line
from trainer.methods import Method, Weights, build_method
from trainer.micro_batch import largest_fitting
from trainer.replay.devices import device_name
from trainer.replay.graphs import fast_predict
from trainer.replay.manifest import ShardLine, publications
from trainer.replay.memory import is_out_of_memory
from trainer.replay.request import ReplayRequest, plan_request
from trainer.replay.state import read_json
from trainer.replay.trajectory import sample_trajectories
from trainer.replay.transport import pool_of_task
from trainer.run import RunDir
from trainer.settings import config_from_run
from trainer.steps import fresh_model, loads, micro_batches, replay_steps
from trainer.tracking.log import read_log
from trainer.world import Role, World, join_world

WARM_UPS = 3  # calls before those that are timed: code is compiled, graphs are captured, memory is found
SECONDS, LEAST, MOST = 1.0, 3, 100  # how long a call is timed, and how often
CPU_KEYS = (("train", "threads"), ("replay", "threads"))  # a device of a CPU is so many threads


@dataclass(frozen=True)
class Rates:
    """Measured, of one device each: real images that a trainer learns a second, with their replay points beside them
    and (the first task) without; evaluations that a teacher makes a second. `source`: what was measured where."""

    images_per_second: float
    images_per_second_without_replay: float | None
    evaluations_per_second: float
    source: str


@dataclass(frozen=True)
class Supply:
    """What follows for `trainers` trainer devices and the `teachers` that the configuration has for them.

    With inline replay there are no teacher devices, and `inline_step_factor` is how many times as long a step takes as
    one whose points come from elsewhere; it is None otherwise, and what concerns teacher devices is None with it.
    `teacher_utilisation` is the share of the time that `teacher_devices_needed` work, `replay_share` what the present
    ones make of what the trainers take, `wait_share` the share of their time that trainers would wait for the rest (by
    another policy than `wait`, of the replay that comes late). `first_shard_seconds` pass in each task from the loading
    of its teacher until the first step has its points.
    """

    rates: Rates
    trainers: int
    teachers: int
    points_per_second: float  # that one trainer device takes
    evaluations_per_point: float
    inline_step_factor: float | None = None
    teacher_devices_per_trainer_device: float | None = None
    teacher_devices_needed: int | None = None
    teacher_utilisation: float | None = None
    replay_share: float | None = None
    wait_share: float | None = None
    first_shard_seconds: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values; `source` beside the rates."""
        plain = asdict(self)
        return plain | {"source": plain["rates"].pop("source")}


def make_supply(config: Config, rates: Rates, trainers: int, teachers: int) -> Supply:
    """The arithmetic. `teachers`: devices, for all the trainers together."""
    request = _request(config)
    per_point = request.evaluations_per_trajectory / (request.points_per_trajectory * request.reuse)
    points = rates.images_per_second * config.replay_batch / config.train.global_batch
    ratio = points * per_point / rates.evaluations_per_second
    supply = Supply(rates, trainers, teachers, points, per_point)
    if config.replay.placement is Placement.inline:
        return replace(supply, inline_step_factor=1 + ratio)
    needed = math.ceil(round(ratio * trainers, 9))  # not one more for a rounding error
    made = teachers / (ratio * trainers)
    shard = request.shard_trajectories * request.evaluations_per_trajectory / rates.evaluations_per_second
    first = math.ceil(config.replay_batch / request.shard_uses)
    return replace(
        supply,
        teacher_devices_per_trainer_device=ratio,
        teacher_devices_needed=needed,
        teacher_utilisation=ratio * trainers / needed,
        replay_share=made,
        wait_share=max(0.0, 1 - made),
        first_shard_seconds=math.ceil(first / teachers) * shard,
    )


def _request(config: Config) -> ReplayRequest:
    """That of the second task; those of the others ask for other classes and cost the same."""
    return plan_request(config, 2, config.classes_until(1), replay_steps(config))


# --- of an earlier run ------------------------------------------------------------------------------------------


def rates_of_run(run: RunDir, config: Config, trainer: str, teacher: str) -> Rates:
    """What an earlier run of the same model has logged.

    Args:
        trainer, teacher: the kinds of device planned for, "cpu" or "cuda".

    Raises:
        UserError: a run of another model or kind of device, or without what is needed, naming the file and key.
    """
    if not run.config.exists():
        raise UserError(f"--rates {run.root}: no run directory, it holds no config.yaml")
    old = config_from_run(run.config)
    _refuse_others(run, old, config, "cpu" in (trainer, teacher))
    stretches = _on(run, list(_stretches(read_log(run.metrics_log) if run.metrics_log.exists() else ())), trainer)
    learning = [stretch for stretch in stretches if stretch.task > 1]
    alone = [stretch for stretch in stretches if stretch.task == 1]
    if not learning:
        raise UserError(
            f"{run.metrics_log}: tells of no two log lines within a task with replay on which device they were measured"
            " (key train.log_every; a run from before that was logged)"
        )
    shards, device = _shards(run, len(old.data.tasks), teacher)
    evaluations, seconds = sum(line.evaluations for line in shards), sum(line.seconds for line in shards)
    last, count = learning[-1], round(sum(stretch.images * stretch.ranks for stretch in learning))
    took = sum(stretch.seconds for stretch in learning)
    source = (
        f"{run.root}: {count:,} images learnt with replay on {last.ranks} x {last.device_name}, {took:.3g} s "
        f"without waits; replay shards: {len(shards)}, of {evaluations:,} evaluations on {device} in {seconds:.3g} s"
    )
    return Rates(_rate(learning), _rate(alone) if alone else None, evaluations / seconds, source)


def _refuse_others(run: RunDir, old: Config, config: Config, cpu: bool) -> None:
    if config.points is OwnPoints.labelled:
        raise UserError(f"{run.config}: method.name=jdcl: what was logged is of two stages; take --measure")
    if old.replay.placement is Placement.inline:
        raise UserError(f"{run.config}: replay.placement=inline: teacher and trainer were not timed apart there")
    before, now = _decisive(old, cpu), _decisive(config, cpu)
    for key, value in now.items():
        if before[key] != value:
            raise UserError(
                f"{run.config}: {key} is {one_line(before[key])}, the plan's is {one_line(value)}: its rates are those "
                "of something else; take --measure"
            )


def _decisive(config: Config, cpu: bool) -> dict[str, Any]:
    """What rates depend on, by key."""
    train, replay = config.train, config.replay
    values = {f"model.{key}": value for key, value in asdict(config.model).items()}
    values |= {"data.image_size": config.data.image_size, "data.channels": config.data.channels}
    values |= {f"train.{key}": getattr(train, key) for key in ("precision", "compile", "activation_checkpointing")}
    values |= {f"replay.{key}": getattr(replay, key) for key in ("precision", "compile")}
    values["replay.sampler_batch"] = min(replay.sampler_batch, replay.shard_trajectories)
    values["replay.batch / train.global_batch"] = config.replay_batch / train.global_batch
    if cpu:
        values |= {f"{section}.{key}": getattr(getattr(config, section), key) for section, key in CPU_KEYS}
    return {key: getattr(value, "value", value) for key, value in values.items()}


@dataclass(frozen=True)
class _Stretch:
    """Between two lines of a log: real images learnt by each of the ranks, in seconds without the waits for replay."""

    task: int
    images: float
    seconds: float
    device: str
    device_name: str
    ranks: int


def _rate(stretches: Iterable[_Stretch]) -> float:
    images, seconds = zip(*[(stretch.images, stretch.seconds) for stretch in stretches], strict=True)
    return sum(images) / sum(seconds)


def _stretches(lines: Iterable[dict[str, Any]]) -> Iterator[_Stretch]:
    """Without the first of each task and attempt, in which much is done once, and those with steps without replay."""
    task, machine = 0, None
    before: float | None = None
    for line in lines:
        event = line.get("event")
        if event == "task":
            task, machine, before = int(_number(line, "task")), _machine(line), None
        elif event == "replay_real_only":
            before = None
        elif event == "train":
            seen, rate, waited = (_number(line, key) for key in ("seen", "images_per_second", "replay_wait_seconds"))
            if machine is not None and before is not None and seen > before and rate > 0:
                device, name, ranks = machine
                seconds = (seen - before) / rate - waited
                if seconds > 0:
                    yield _Stretch(task, (seen - before) / ranks, seconds, device, name, ranks)
            before = seen


def _machine(line: dict[str, Any]) -> tuple[str, str, int] | None:
    """Kind and name of the device, and the number of ranks; None in a log from before they were told."""
    device, name, ranks = (line.get(key) for key in ("device", "device_name", "ranks"))
    if isinstance(device, str) and isinstance(name, str) and isinstance(ranks, int) and ranks > 0:
        return device, one_line(name), ranks
    return None


def _number(line: dict[str, Any], key: str) -> float:
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0


def _on(run: RunDir, stretches: list[_Stretch], kind: str) -> list[_Stretch]:
    """Those on the kind of device that is wanted, as many of them as the last; [] where there are none at all.

    Raises:
        UserError: all are of another kind.
    """
    chosen = [stretch for stretch in stretches if stretch.device == kind]
    if stretches and not chosen:
        raise UserError(f"{run.metrics_log}: trained on {stretches[-1].device_name}, the plan's trainers are on {kind}")
    return [s for s in chosen if (s.device_name, s.ranks) == (chosen[-1].device_name, chosen[-1].ranks)]


def _shards(run: RunDir, tasks: int, kind: str) -> tuple[list[ShardLine], str]:
    """Shards whose making was timed on the kind of device that is wanted, and what device that was; without the first
    of each worker in each task, with which the teacher is compiled and its graphs are captured.

    Raises:
        UserError: there are none.
    """
    beats: dict[int, dict[str, Any]] = {}
    found: list[ShardLine] = []
    for task in range(2, tasks + 1):
        begun: set[int] = set()
        for line in publications(pool_of_task(run, task).open_journal()):
            beats.setdefault(line.worker, read_json(run.sampler(line.worker)))
            if line.worker in begun and line.seconds > 0 and line.evaluations > 0:
                found.append(line)
            begun.add(line.worker)
    devices = {worker: str(beat.get("device", "")).partition(":")[0] for worker, beat in beats.items()}
    chosen = [line for line in found if devices[line.worker] == kind]
    if found and not chosen:
        have = one_line(devices[found[-1].worker] or "an unknown device")
        raise UserError(f"{run.root}: its teacher sampled on {have}, the plan's teachers are on {kind}")
    if not chosen:
        raise UserError(
            f"{run.root}: no sampler has made two replay shards of one task (key replay.shard_trajectories); the first "
            "does not count, with it the teacher is loaded"
        )
    names = sorted({one_line(beats[line.worker].get("device_name", kind)) for line in chosen})
    workers = len({line.worker for line in chosen})
    return chosen, f"{workers} x {' and '.join(names)}"


# --- measured here ----------------------------------------------------------------------------------------------


def measure_rates(config: Config, trainers: int, trainer: str, teacher: str) -> Rates:
    """Time a trainer's step and a teacher's trajectories on this machine, one after the other, on made-up data.

    The trainer is the engine itself in a world of one rank, with that rank's share of each step: nothing is read, and
    nothing is sent to other ranks.

    Args:
        trainers: the ranks of this node that share a step.
        trainer, teacher: the kinds of device planned for, "cpu" or "cuda".

    Raises:
        UserError: no such device here, or too little memory on it.
    """
    if "cuda" in (trainer, teacher) and not torch.cuda.is_available():
        raise ConfigError("--measure: this machine has no CUDA device, and the plan is for one; measure there")
    share = copy.deepcopy(config)
    share.train.global_batch, share.replay.batch = (
        config.train.global_batch // trainers,
        config.replay_batch // trainers,
    )
    with redirect_stdout(sys.stderr), _alone(config, trainers) as world:  # DeepSpeed prints
        threads = torch.get_num_threads()
        if teacher == "cpu" and config.replay.placement is not Placement.inline:
            torch.set_num_threads(config.replay.threads)
        evaluations, sampled = _time_teacher(share, torch.device(teacher))
        torch.set_num_threads(threads)
        with_replay, without, learnt = _time_trainer(share, world)
    images = share.train.global_batch
    return Rates(images / with_replay, images / without, evaluations, f"measured here: {learnt}; {sampled}")


@contextmanager
def _alone(config: Config, trainers: int) -> Iterator[World]:
    """A world of this process, with the CPU threads of one of so many trainers."""
    from trainer.session import trainer_threads  # the whole trainer, which most plans can do without

    if not torch.cuda.is_available():
        keep_freed_memory()
    role = Role("trainer", 0, trainers, {"LOCAL_SIZE": str(trainers)})
    world = join_world(0, config.train.threads or trainer_threads(config, role))
    try:
        yield world
    finally:
        dist.destroy_process_group()


def _time_teacher(config: Config, device: torch.device) -> tuple[float, str]:
    """Evaluations a second, and what was timed."""
    request = _request(config)
    if request.labelled:  # two teachers, each as fast as one
        request = replace(request, points=Points.renoised.value, local_classes=[], outputs=0)
    most = config.replay_batch if config.replay.placement is Placement.inline else request.shard_trajectories
    count = min(request.sampler_batch, most)
    indices = np.arange(count, dtype=np.int64)
    schedule = make_schedule(config.diffusion).to(device)
    model = fresh_model(config).to(device, DTYPES[config.replay.precision]).eval().requires_grad_(False)
    predict = fast_predict(model, device, compiled=config.replay.compile)
    short = replace(request, steps=1, points_per_trajectory=1)  # batches of the same shape, fewer of them
    with _names_the_key("replay.sampler_batch"), torch.inference_mode():
        for _ in range(WARM_UPS):
            sample_trajectories(predict, schedule, short, indices, device)
        seconds, times = _timed(lambda: sample_trajectories(predict, schedule, request, indices, device), device)
    told = f"{times} x {count} trajectories of {request.evaluations_per_trajectory} evaluations on"
    return count * request.evaluations_per_trajectory / seconds, f"{told} {device_name(device)}"


def _time_trainer(config: Config, world: World) -> tuple[float, float, str]:
    """Seconds of a step with replay and of one without, and what was timed."""
    images, points = config.train.global_batch, config.replay_batch
    method = build_method(config)
    with _names_the_key("train.micro_batch"):
        if config.train.micro_batch == AUTO:
            config.train.micro_batch = images if world.device.type == "cpu" else largest_fitting(config, world)
        with closing(Engine(fresh_model(config), config, world)) as engine:
            make = partial(trial_examples, config, dtype=engine.dtype, device=world.device)
            fed = loads(config, make, images, points)[-1], loads(config, make, images, 0)[0]
            taken: list[tuple[float, int]] = []
            for current, rehearsed in fed:
                for _ in range(WARM_UPS):
                    trial_step(engine, method, current, rehearsed)
                work = partial(trial_step, engine, method, current, rehearsed)
                taken.append(_timed(work, world.device))
    (with_replay, many), (without, others) = taken
    told = f"{many} steps of {images} real images with {points} replay points and {others} without on"
    return with_replay, without, f"{told} {device_name(world.device)}"


def trial_step(engine: Engine, method: Method, current: Examples, rehearsed: Examples | None) -> None:
    weights = Weights() if rehearsed is None else Weights(share=0.5)
    for part, rehearsed_part in micro_batches(current, rehearsed, engine.accumulation):
        engine.backward(method.loss(engine.model, part, rehearsed_part, weights)["loss"])
    engine.step()


def trial_examples(config: Config, count: int, *, dtype: torch.dtype, device: torch.device) -> Examples:
    data = config.data
    shape = count, data.channels, data.image_size, data.image_size
    noise = torch.Generator().manual_seed(config.run.seed)
    x, target = (torch.randn(shape, generator=noise).to(device, dtype) for _ in range(2))
    t = torch.randint(config.diffusion.timesteps, (count,), generator=noise).to(device)
    return Examples(x, t, target, torch.zeros_like(t))


def _timed(work: Callable[[], object], device: torch.device) -> tuple[float, int]:
    """Seconds of one call, and how many calls that is the mean of: about `SECONDS` of them."""
    once = _seconds(work, 1, device)
    count = min(max(int(SECONDS / once), LEAST), MOST)
    return _seconds(work, count, device) / count, count


def _seconds(work: Callable[[], object], count: int, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - began, 1e-9)


@contextmanager
def _names_the_key(key: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"--measure: out of memory ({one_line(error)[:100]}); take a smaller {key}") from None
