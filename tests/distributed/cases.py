"""What the ranks of a pool can be asked to do. Arguments and results are JSON; float32 survives it exactly."""

from __future__ import annotations

import errno
import math
import os
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

import trainer.engine
import trainer.partition
from tests.distributed import toy
from tests.distributed.judge_cases import judge as judge
from tests.distributed.loop_cases import choose_and_learn as choose_and_learn
from tests.distributed.loop_cases import learn as learn
from trainer.config import Config, OptimizerName, PenaltyName, Precision
from trainer.engine import Engine
from trainer.errors import UserError
from trainer.methods import Memory, build_penalty
from trainer.steps import fresh_model
from trainer.world import World

FACTORS = {"infinite": torch.inf, "huge": 1e25}  # poisons of the gradient


def make_engine(world: World, **settings: Any) -> Engine:
    """An engine of the toy, its parameters of 15 elements and more really sharded under ZeRO-3."""
    config = Config()
    config.zero.stage = settings.get("stage", 1)
    config.train.precision = Precision(settings.get("precision", "fp32"))
    config.train.global_batch = toy.GLOBAL_BATCH
    config.train.micro_batch = settings.get("micro_batch", 0)
    config.optimizer.name = OptimizerName(settings.get("optimizer", "adam"))
    config.optimizer.clip_norm = settings.get("clip_norm", 0.0)
    config.optimizer.weight_decay = settings.get("weight_decay", 0.0)
    config.ema.decay = settings.get("decay", 0.0)
    config.train.compile = settings.get("compile", False)
    if config.train.precision is Precision.fp16:
        allow_fp16_on_the_cpu()
    trainer.engine.PERSISTENT_NUMEL = 15
    trainer.partition.GATHER_NUMEL = 7
    return Engine(toy.make_model(settings.get("seed", 0)), config, world)


def allow_fp16_on_the_cpu() -> None:
    """Engine and DeepSpeed refuse it, as too slow or rounded otherwise; for a toy torch's CPU kernels will do."""
    from deepspeed.accelerator import get_accelerator  # not before the world has chosen the accelerator

    trainer.engine.check_engine = lambda config, device_type: None
    get_accelerator().is_fp16_supported = lambda: True


def train_steps(engine: Engine, world: World, begin: int, end: int, poison: str = "") -> dict[str, list[float]]:
    """Global losses and gradient norms of the steps [begin, end).

    With a poison, the first micro-batch of the last rank is spoilt in each of them: `loss` makes its loss NaN and
    leaves the gradient finite, `infinite` its gradient infinite, `huge` too large to be squared in fp32.
    """
    losses, norms = list[float](), list[float]()
    for step in range(begin, end):
        engine.set_lr(toy.learning_rate(step))
        parts = [part.chunk(engine.accumulation) for part in toy.batch(step, world.rank, world.size)]
        local = torch.zeros(())
        for number, (x, t, label, target) in enumerate(zip(*parts, strict=True)):
            output = engine.model(x.to(engine.dtype), t, label).float()
            loss = (output - target).pow(2).mean()
            if number == 0 and world.rank == world.size - 1:
                if poison in FACTORS:
                    output.register_hook(lambda gradient: gradient * FACTORS[poison])
                loss = loss + (torch.nan if poison == "loss" else 0.0)
            engine.backward(loss)
            local += loss.detach() / engine.accumulation
        engine.step()
        losses.append(world.all_gather(local[None]).mean().item())
        assert engine.grad_norm is not None and engine.grad_norm.dtype is torch.float32
        norms.append(engine.grad_norm.item())
    return {"losses": losses, "norms": norms}


def plain(tensors: dict[str, Tensor]) -> dict[str, list[float]]:
    return {name: tensor.flatten().tolist() for name, tensor in tensors.items()}


def held(world: World, kind: str, tasks: int, steps: int, **settings: Any) -> dict[str, Any]:
    """Train with a penalty on so many toy memories; its value at each step, losses, norms, weights."""
    engine = make_engine(world, **settings)
    config = Config()
    config.method.penalty, config.method.penalty_weight = PenaltyName(kind), toy.PENALTY_WEIGHT
    penalty = build_penalty(config)
    assert penalty is not None
    for task in range(tasks):
        weights, fisher, scale = toy.memory(task)
        penalty.remember(Memory(engine.part(weights.__getitem__), engine.part(fisher.__getitem__), scale))
    engine.hold(penalty)
    result: dict[str, Any] = {"losses": [], "norms": [], "values": []}
    for step in range(steps):
        for name, values in train_steps(engine, world, step, step + 1).items():
            result[name] += values
        assert engine.penalty is not None
        result["values"].append(engine.penalty.item())
    result |= {"weights": plain(engine.weights(ema=False)), "skips": engine.skips()}
    engine.close()
    return result


def train(world: World, steps: int, reset_at: int | None = None, **settings: Any) -> dict[str, Any]:
    """Train from the start, the moments reset before step `reset_at`; losses, norms, weights and EMA."""
    engine = make_engine(world, **settings)
    middle = steps if reset_at is None else reset_at
    result = train_steps(engine, world, 0, middle)
    if reset_at is not None:
        engine.reset_moments()
    rest = train_steps(engine, world, middle, steps)
    result = {name: values + rest[name] for name, values in result.items()}
    ending = {"weights": plain(engine.weights(ema=False)), "ema": plain(engine.weights(ema=True))}
    ending["skips"] = engine.skips()
    engine.close()
    return result | ending


def save(world: World, directory: str, steps: int, **settings: Any) -> dict[str, Any]:
    """Train and write a checkpoint."""
    engine = make_engine(world, **settings)
    train_steps(engine, world, 0, steps)
    engine.save(Path(directory), {"seen_images": steps * toy.GLOBAL_BATCH})
    engine.flush()
    result = {"weights": plain(engine.weights(ema=False)), "skips": engine.skips()}
    engine.close()
    return result


def save_and_go_on(world: World, directories: list[str], steps: int, **settings: Any) -> dict[str, Any]:
    """Save and train on without waiting, once for each directory; the first write is held up until training went on."""
    engine = make_engine(world, **settings)
    train_steps(engine, world, 0, steps)
    may_write, extra = threading.Event(), {"steps": [steps]}
    with mock.patch("trainer.checkpoint.save_file", lambda *args: may_write.wait() and save_file(*args)):
        engine.save(Path(directories[0]), extra)
        extra["steps"].append(-1)
        train_steps(engine, world, steps, steps + 2)
        early = engine.published()
        may_write.set()
        for directory in directories[1:]:
            engine.save(Path(directory), {"steps": [steps]})
        engine.flush()
    published = [str(path) for path in engine.published()]
    engine.close()
    threads = sum(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    return {"early": early, "published": published, "threads": threads}


def resume(world: World, directory: str, begin: int, end: int, **settings: Any) -> dict[str, Any]:
    """Go on from a checkpoint in an engine that began with other weights; what it loaded and what it then learnt."""
    engine = make_engine(world, seed=1, **settings)
    extra = engine.load(Path(directory))
    loaded = plain(engine.weights(ema=False))
    parts = [part[:2] for part in toy.batch(0)]
    output = engine.model(parts[0].to(engine.dtype), parts[1], parts[2]).float()
    result = train_steps(engine, world, begin, end)
    result |= {"weights": plain(engine.weights(ema=False)), "ema": plain(engine.weights(ema=True))}
    result["skips"] = engine.skips()
    engine.close()
    return result | {"extra": extra, "loaded": loaded, "output": output.flatten().tolist()}


def resave(world: World, source: str, target: str, **settings: Any) -> None:
    """Load a checkpoint and write it again, as this world and stage keep it."""
    engine = make_engine(world, seed=1, **settings)
    engine.save(Path(target), engine.load(Path(source)))
    engine.flush()
    engine.close()


def survive(world: World, poison: str, times: int, **settings: Any) -> dict[str, Any]:
    """Six steps, with `times` spoilt ones in the middle; what was skipped, before, after and at the end."""
    engine = make_engine(world, **settings)
    train_steps(engine, world, 0, 3)
    skips = [engine.skips()]
    for _ in range(times):
        assert not math.isfinite(train_steps(engine, world, 2, 3, poison)["norms"][0])
    skips.append(engine.skips())
    train_steps(engine, world, 3, 6)
    skips.append(engine.skips())
    result = {"weights": plain(engine.weights(ema=False)), "ema": plain(engine.weights(ema=True)), "skips": skips}
    engine.close()
    return result


def loss_scales(world: World, schedule: str, **settings: Any) -> dict[str, Any]:
    """fp16 loss scale after each step of a schedule, from 1024, doubled after two good steps: `.` good, `x` spoilt."""
    engine = make_engine(world, precision="fp16", **settings)
    scaler = engine._engine.optimizer.loss_scaler
    scaler.cur_scale, scaler.min_scale, scaler.scale_window = 1024.0, 256.0, 2
    scaler.delayed_shift = scaler.cur_hysteresis = 1
    scales = list[float]()
    for step, kind in enumerate(schedule):
        train_steps(engine, world, step, step + 1, poison="loss" if kind == "x" else "")
        scales.append(scaler.cur_scale)
    result = {"scales": scales, "skips": engine.skips()}
    engine.close()
    return result


def two_terms(world: World, steps: int, **settings: Any) -> list[float]:
    """Two forward passes before each backward, as a distillation step has them, from the second step on."""
    engine = make_engine(world, **settings)
    losses = list[float]()
    for step in range(steps):
        engine.set_lr(1e-2)
        x, t, label, target = toy.batch(step, world.rank, world.size)
        loss = (engine.model(x, t, label) - target).pow(2).mean()
        if step > 0:
            loss = loss + 0.5 * engine.model(x.flip(0), t, None).pow(2).mean()
        engine.backward(loss)
        engine.step()
        losses.append(world.all_gather(loss.detach()[None]).mean().item())
    engine.close()
    return losses


def unet_weights(world: World, stage: int) -> list[str]:
    """Names of the weights of a small U-Net that an engine gives back changed, before any step."""
    config = Config()
    config.zero.stage = stage
    config.model.channels, config.model.norm_groups, config.model.max_classes = [8, 16], 4, 3
    trainer.engine.PERSISTENT_NUMEL = 15
    model = fresh_model(config)
    given = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    engine = Engine(model, config, world)
    found = engine.weights(ema=False)
    engine.close()
    return [name for name in given.keys() | found.keys() if not torch.equal(given[name], found[name])]


def world_methods(world: World) -> dict[str, Any]:
    """Every collective once, with what it gave on this rank."""
    world.barrier()
    mine = torch.tensor([[world.rank, 10.0 + world.rank]])
    return {
        "rank": world.rank,
        "size": world.size,
        "main": world.is_main,
        "device": world.device.type,
        "broadcast": world.broadcast_int(2**60 + world.rank),
        "any": [world.any(False), world.any(world.rank == 1)],
        "gathered": world.all_gather(mine).tolist(),
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "threads": torch.get_num_threads(),
        "shared_memory": [path.name for path in Path("/dev/shm").glob("deepspeed*")],
    }


def main_only(world: World, failing: bool) -> str:
    """What each rank gets of work that the main rank does alone."""

    def work() -> str:
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device", "metrics.json")
        return "done"

    try:
        return str(world.on_main(work))
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def everywhere(world: World, path: str, failing: int) -> str:
    """What each rank gets of work that the main rank does first; the failing one cannot do it."""

    def work() -> str:
        if world.rank == failing:
            raise UserError("no weights here")
        found = Path(path).exists()
        Path(path).touch()
        return f"{found}"

    try:
        return world.main_first(work)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def group_timeouts(world: World) -> list[float]:
    """Seconds after which collectives give up: of the default group, of one made without asking for a timeout, and of
    the words between ranks."""
    groups: list[Any] = [torch.distributed.group.WORLD, torch.distributed.new_group(), world.control]
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def fail(world: World, rank: int) -> None:
    """Raise on one rank while the others wait for it."""
    if world.rank == rank:
        raise ValueError("as asked")
    world.barrier()


def stall(world: World) -> None:
    time.sleep(3600)


def refused(world: World, directory: str) -> str:
    """The message with which loading is refused."""
    engine = make_engine(world)
    try:
        engine.load(Path(directory))
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def unwritable(world: World, directory: str) -> str:
    """The message with which saving is refused."""
    engine = make_engine(world)
    train_steps(engine, world, 0, 1)
    engine.save(Path(directory), {})
    try:
        engine.flush()
    except UserError as error:
        return str(error)
    raise AssertionError("nothing was refused")
