"""Means of what steps tell."""

from __future__ import annotations

import math

import torch

from trainer.meter import Meter
from trainer.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def test_means_since_the_last_fetch() -> None:
    meter = Meter()
    for value in (1.0, 2.0, 6.0):
        meter.add("loss", torch.tensor(value, dtype=torch.bfloat16))
    meter.add("norm", torch.tensor(5.0))
    assert meter.fetch(ALONE) == {"loss": 3.0, "norm": 5.0}
    assert meter.fetch(ALONE) == {}


def test_skipped_steps_do_not_spoil_a_mean() -> None:
    meter = Meter()
    for value in (1.0, math.nan, 2.0, math.inf):
        meter.add("loss", torch.tensor(value))
        meter.add("norm", torch.tensor(math.nan))
    means = meter.fetch(ALONE)
    assert means["loss"] == 1.5
    assert math.isnan(means["norm"])
