"""What the engine refuses before anything is started, and how batches divide."""

from __future__ import annotations

import pytest

from trainer.config import Config, Precision
from trainer.engine import accumulation_steps, check_engine
from trainer.errors import ConfigError


def make_config(stage: int = 1, precision: str = "fp32", global_batch: int = 64, micro_batch: int = 0) -> Config:
    config = Config()
    config.zero.stage, config.train.precision = stage, Precision(precision)
    config.train.global_batch, config.train.micro_batch = global_batch, micro_batch
    return config


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_needs_zero(precision: str) -> None:
    with pytest.raises(ConfigError, match=rf"zero\.stage=0 with train\.precision={precision}"):
        check_engine(make_config(0, precision), "cuda")


def test_the_cpu_has_no_fp16() -> None:
    with pytest.raises(ConfigError, match=r"train\.precision=fp16"):
        check_engine(make_config(1, "fp16"), "cpu")
    check_engine(make_config(1, "fp16"), "cuda")


@pytest.mark.parametrize("stage", [-1, 4])
def test_there_are_four_stages(stage: int) -> None:
    with pytest.raises(ConfigError, match=r"zero\.stage"):
        check_engine(make_config(stage), "cpu")


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16"), (3, "fp32")])
def test_the_rest_is_accepted(stage: int, precision: str) -> None:
    check_engine(make_config(stage, precision), "cpu")


@pytest.mark.parametrize(("micro_batch", "ranks", "steps"), [(0, 2, 1), (16, 2, 2), (8, 1, 8), (32, 2, 1)])
def test_micro_batches(micro_batch: int, ranks: int, steps: int) -> None:
    assert accumulation_steps(make_config(micro_batch=micro_batch), ranks) == steps


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match=r"train\.global_batch=64"):
        accumulation_steps(make_config(), 3)
    with pytest.raises(ConfigError, match=r"train\.micro_batch=12"):
        accumulation_steps(make_config(micro_batch=12), 2)
