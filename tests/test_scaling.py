"""Predictions for more devices against sums done by hand and the volumes of the ZeRO paper."""

from __future__ import annotations

import math

import pytest

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.plan import as_json, make_plan, with_scales
from trainer.rates import Rates
from trainer.scaling import Link, collectives, communication_seconds, predict, sent_bytes
from trainer.settings import load_config
from trainer.steps import count_parameters

NO_LATENCY = Link(1e9, 0.0)


def digits(*overrides: str) -> Config:
    pool = [] if "replay.placement=inline" in overrides else ["replay.points_per_trajectory=10"]
    return load_config("digits.yaml", [*pool, "train.images_per_task=6400", *overrides])


@pytest.mark.parametrize(("stage", "vectors"), [(0, 2), (1, 3), (2, 3), (3, 3)])
def test_many_ranks_send_whole_vectors(stage: int, vectors: int) -> None:
    """Section 7 of the paper: 2 for data parallelism, 3 for ZeRO 3; DeepSpeed takes 3 in stages 1 and 2 too."""
    config = digits(f"zero.stage={stage}")
    assert sent_bytes(1000, config, 10**6) == pytest.approx(4 * vectors * 1000, rel=1e-5)
    assert sent_bytes(1000, config, 2) == 4 * vectors * 500


def test_half_precision_sends_half() -> None:
    assert sent_bytes(1000, digits("train.precision=bf16"), 8) == sent_bytes(1000, digits(), 8) / 2


def test_seconds_are_those_of_bytes_and_of_waits() -> None:
    config = digits("zero.stage=1")
    link = Link(bytes_per_second=2e6, latency=1e-3)
    expected = 3 * 4 * 1_000_000 * 3 / 4 / 2e6 + 3 * 2 * 1e-3  # three collectives, each two latencies on four ranks
    assert communication_seconds(1_000_000, config, link, 4) == pytest.approx(expected)
    assert communication_seconds(1_000_000, config, link, 1) == 0


def test_zero_3_gathers_by_the_parameter() -> None:
    assert collectives(digits("zero.stage=0")) == 1
    assert collectives(digits("zero.stage=3")) == 1  # all of its parameters are small enough to be kept whole
    assert collectives(digits("zero.stage=3", "model.channels=[64,128]")) > 10


def test_a_run_by_hand() -> None:
    """One trainer device: 64 images in 0.64 s; a teacher is needed for each four trainers (2 evaluations a point)."""
    config = digits("zero.stage=0")
    rates = Rates(100.0, 200.0, 800.0, "by hand")
    found = predict(config, rates, NO_LATENCY, planned=1, devices=10)
    assert (found.trainers, found.teachers, found.global_batch) == (8, 2, 8 * 64)
    sending = 2 * 4 * count_parameters(config) * 7 / 8 / 1e9
    assert found.communication_seconds == pytest.approx(sending)
    assert found.step_seconds == pytest.approx(0.64 + sending)
    assert found.images_per_second == pytest.approx(8 * 64 / (0.64 + sending))
    assert found.efficiency == pytest.approx(0.64 / (0.64 + sending))
    assert found.image_bytes_per_second == pytest.approx(found.images_per_second * 64)
    steps = 6400 / (8 * 64)
    assert found.seconds == pytest.approx(steps * (0.32 + sending) + 4 * steps * (0.64 + sending))


def test_slow_links_need_fewer_teachers() -> None:
    config, rates = digits(), Rates(100.0, None, 200.0, "by hand")
    fast, slow = (predict(config, rates, Link(speed, 0.0), 1, 64) for speed in (1e12, 1e6))
    assert fast.teachers == 32 > slow.teachers
    assert slow.efficiency < 0.1 < 0.99 < fast.efficiency
    assert math.isclose(slow.trainers + slow.teachers, 64)


def test_inline_replay_takes_its_time_and_no_devices() -> None:
    config = digits("replay.placement=inline")
    found = predict(config, Rates(100.0, None, 1100.0, "by hand"), NO_LATENCY, 1, 4)
    assert (found.trainers, found.teachers) == (4, 0)
    assert found.step_seconds - found.communication_seconds == pytest.approx(0.64 * 2)  # 11 evaluations a point
    assert found.replay_bytes_per_second == 0


def test_too_few_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="--scale 1: too few"):
        predict(digits(), Rates(100.0, None, 800.0, "by hand"), NO_LATENCY, 1, 1)


def test_predictions_need_rates() -> None:
    plan = make_plan(digits(), 1, 0)
    with pytest.raises(ConfigError, match="add --measure"):
        with_scales(plan, digits(), NO_LATENCY, (8,))
    assert as_json(plan)["scales"] == ()
