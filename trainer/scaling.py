"""What a run costs on more devices, from rates measured on a few: docs/scaling.md has the model and its checks.

Weak scaling: each trainer device keeps its share of a step, so that the global batch grows with the devices. A step is

    t(N) = t_compute + V(N) / B + C log2(N) L

with t_compute the measured seconds of a step of one device, V the bytes that a rank sends, C the collectives of a step,
and B and L bandwidth and latency of a rank's link. Nothing overlaps: the engine reduces after the backward pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from trainer.config import Config
from trainer.engine import BUCKET_NUMEL, PERSISTENT_NUMEL
from trainer.errors import ConfigError
from trainer.memory import WIDTH
from trainer.rates import Rates, make_supply
from trainer.replay.request import plan_request
from trainer.steps import count_parameters, replay_steps, shapes_of_model

SHARES_SENT = {0: 2, 1: 3, 2: 3, 3: 3}  # by ZeRO stage: vectors of the weights' length that pass each link, counted


@dataclass(frozen=True)
class Link:
    """Between trainer devices: bytes that one of them sends a second, and seconds until a message arrives."""

    bytes_per_second: float
    latency: float


@dataclass(frozen=True)
class Scale:
    """A run on so many devices, `trainers` of which train and `teachers` of which sample.

    `efficiency` is what a trainer device learns, as a share of what it learns alone. `image_bytes_per_second` are
    those of decoded images: what raw shards are read with, and more than compressed ones are.
    """

    devices: int
    trainers: int
    teachers: int
    global_batch: int
    step_seconds: float
    communication_seconds: float
    images_per_second: float
    efficiency: float
    image_bytes_per_second: float
    replay_bytes_per_second: float
    seconds: float  # of training in all tasks, without evaluations


def sent_bytes(parameters: int, config: Config, ranks: int) -> float:
    """Bytes that a rank sends in a step, by ring collectives.

    An all-reduce of S bytes sends 2 S (N-1)/N of each rank, a gather or scatter half of it. ZeRO 0 reduces the
    gradients. ZeRO 1 and 2 reduce them too (DeepSpeed all-reduces whole buckets, of which each rank keeps its part) and
    gather the weights. ZeRO 3 gathers the weights twice and scatters the gradients (Rajbhandari et al. 2020, section
    7, by which stages 1 and 2 could do with as little as stage 0).
    """
    width = WIDTH[config.train.precision]
    return SHARES_SENT[config.zero.stage] * width * parameters * (ranks - 1) / ranks


def collectives(config: Config) -> int:
    """Of a step, one after the other. ZeRO 0: one all-reduce. ZeRO 1 and 2: one for each bucket of gradients, one for
    their norm, one gather. ZeRO 3: two gathers and a scatter of each parameter that is not kept whole, and the norm."""
    sizes = [parameter.numel() for parameter in shapes_of_model(config).parameters()]
    if config.zero.stage == 0:
        return 1
    if config.zero.stage < 3:
        return math.ceil(sum(sizes) / BUCKET_NUMEL) + 2
    return 3 * sum(size > PERSISTENT_NUMEL for size in sizes) + 1


def communication_seconds(parameters: int, config: Config, link: Link, ranks: int) -> float:
    """Seconds of a step in which a rank does nothing but send and wait for what others send."""
    if ranks == 1:
        return 0.0
    waits = collectives(config) * math.log2(ranks) * link.latency
    return sent_bytes(parameters, config, ranks) / link.bytes_per_second + waits


def predict(config: Config, rates: Rates, link: Link, planned: int, devices: int) -> Scale:
    """A run on `devices` devices in all.

    Args:
        rates: of one device each, of a step's share with `planned` trainers.
        planned: trainer devices that the configuration's global batch is divided between.

    Raises:
        ConfigError: too few devices for one trainer beside its teachers.
    """
    share, parameters = config.train.global_batch // planned, count_parameters(config)
    supply = make_supply(config, rates, 1, 1)
    ratio = supply.teacher_devices_per_trainer_device or 0.0
    compute = share / rates.images_per_second * (supply.inline_step_factor or 1.0)
    alone = share / (rates.images_per_second_without_replay or rates.images_per_second)
    teachers = 0
    while True:  # trainers that wait for each other need fewer teachers
        trainers = devices - teachers
        if trainers < 1:
            raise ConfigError(f"--scale {devices}: too few; trainer and teacher need a device each")
        sending = communication_seconds(parameters, config, link, trainers)
        step = compute + sending
        if teachers >= math.ceil(round(ratio * trainers * compute / step, 9)):
            break
        teachers += 1
    steps_of_task = config.train.images_per_task / (trainers * share)
    images = trainers * share / step
    points = images * config.replay_batch / config.train.global_batch
    return Scale(
        devices=devices,
        trainers=trainers,
        teachers=teachers,
        global_batch=trainers * share,
        step_seconds=step,
        communication_seconds=sending,
        images_per_second=images,
        efficiency=compute / step,
        image_bytes_per_second=images * config.data.channels * config.data.image_size**2,
        replay_bytes_per_second=points * _bytes_per_point(config),
        seconds=steps_of_task * (alone + sending + (len(config.data.tasks) - 1) * step),
    )


def _bytes_per_point(config: Config) -> float:
    """Of replay shards, for each use of a point."""
    request = plan_request(config, 2, config.classes_until(1), replay_steps(config))
    if not request.shards:  # in the loop: nothing is written
        return 0.0
    return request.shard_bytes / request.shard_uses
