"""What the log says of speed and memory, against arithmetic by hand."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from trainer import performance
from trainer.config import Config, Precision
from trainer.performance import Performance, device_peak, peak_tflops
from trainer.position import Position, no_cost
from trainer.steps import forward_flops

CPU = torch.device("cpu")


def small_config() -> Config:
    config = Config()
    config.model.channels, config.model.norm_groups, config.model.attention_levels = [8, 16], 4, [1]
    config.model.max_classes = 10
    return config


def test_forward_flops_of_the_reference_model() -> None:
    """79.4 GFLOP: the U-Net of 116 M parameters at 64x64 that the project measures itself with."""
    config = Config()
    config.data.image_size, config.data.channels = 64, 3
    model = config.model
    model.channels, model.layers_per_block, model.norm_groups = [128, 256, 384, 512], 3, 32
    model.attention_levels, model.attention_head_dim, model.max_classes = [2, 3], 64, 100
    assert forward_flops(config) == pytest.approx(79.4e9, rel=1e-3)


def test_forward_flops_count_what_the_layers_do() -> None:
    """Twice the multiplications of each convolution and linear layer, watched at work, and of attention's products."""
    from trainer.steps import fresh_model

    config, counted = small_config(), [0]

    def watch(module: nn.Module, _: object, output: torch.Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            counted[0] += 2 * output.numel() * module.weight[0].numel()
        elif isinstance(module, nn.Linear):
            counted[0] += 2 * output.numel() * module.in_features

    model = fresh_model(config)
    for module in model.modules():
        module.register_forward_hook(watch)
    zero = torch.zeros(1, dtype=torch.int64)
    model(torch.zeros(1, 1, 8, 8), zero, zero)
    attentions = sum(type(module).__name__ == "Attention" for module in model.modules())
    assert attentions == 4
    counted[0] += attentions * 2 * (2 * 16 * 16 * 16)  # q k' and its product with v: 4x4 positions, 16 channels
    assert forward_flops(config) == counted[0]


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H200", Precision.bf16, 989.5),
        ("NVIDIA H100 80GB HBM3", Precision.fp16, 989.5),
        ("NVIDIA H100 PCIe", Precision.bf16, 756.0),
        ("NVIDIA A100-SXM4-80GB", Precision.bf16, 312.0),
        ("NVIDIA A100 80GB PCIe", Precision.fp32, 156.0),
        ("NVIDIA A10", Precision.bf16, 125.0),
        ("NVIDIA L40S", Precision.bf16, 362.0),
        ("NVIDIA GeForce RTX 4090", Precision.bf16, 165.2),
        ("Tesla V100-SXM2-32GB", Precision.fp16, 125.0),
        ("Tesla V100-SXM2-32GB", Precision.fp32, 15.7),
        ("Tesla V100-SXM2-32GB", Precision.bf16, None),  # has no unit for it
        ("NVIDIA B200", Precision.bf16, 2250.0),
        ("NVIDIA A10G", Precision.bf16, None),  # another card than the A10
        ("NVIDIA GeForce RTX 4090 D", Precision.bf16, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", Precision.bf16, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", Precision.bf16, None),  # a part of a card
    ],
)
def test_peaks_by_name(name: str, precision: Precision, peak: float | None) -> None:
    assert peak_tflops(name, precision, tf32=True) == peak


def test_fp32_without_tf32() -> None:
    assert peak_tflops("NVIDIA H100 80GB HBM3", Precision.fp32, tf32=True) == 494.5
    assert peak_tflops("NVIDIA H100 80GB HBM3", Precision.fp32, tf32=False) == 67.0


def test_a_cpu_has_no_peak_but_the_one_that_is_named() -> None:
    config = Config()
    assert device_peak(config, CPU) is None
    config.train.peak_tflops = 1.5
    assert device_peak(config, CPU) == 1.5


class Clock:
    """In place of the time module."""

    def __init__(self) -> None:
        self.now = 50.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(performance, "time", clock)
    return clock


def test_rates_and_shares_of_an_interval(clock: Clock) -> None:
    config = small_config()
    config.train.peak_tflops = 1e-3  # 1 GFLOP/s
    measured, cost = Performance(config, CPU, ranks=2), no_cost()

    def slow_batches() -> Iterator[int]:
        for number in range(3):
            clock.now += 0.25
            yield number

    clock.now += 7.0  # before the task
    measured.start(starved=1.0)
    for _ in measured.timed(slow_batches()):
        clock.now += 1.75
        measured.count(8, 4)
    found = measured.fetch(1.5, cost)
    flops = 3 * forward_flops(config) * 3 * 12
    assert found.pop("peak_memory_gb") == cost["peak_memory_gb"] > 0
    assert found == pytest.approx(
        {
            "images_per_second": 2 * 3 * 8 / 6.0,
            "data_wait_seconds": 0.75,
            "replay_wait_seconds": 0.5,
            "model_tflops": flops / 6.0 / 1e12,
            "mfu": flops / 6.0 / 1e9,
        }
    )
    clock.now += 2.0
    measured.count(8, 0)
    second = measured.fetch(1.5, cost)
    assert second["images_per_second"] == pytest.approx(8.0)
    assert second["data_wait_seconds"] == second["replay_wait_seconds"] == 0.0
    cost["train_seconds"] = 8.0
    whole = measured.account(cost)
    assert whole["data_wait_seconds"] == 0.75
    assert whole["mfu"] == pytest.approx((flops + 3 * forward_flops(config) * 8) / 8.0 / 1e9)


def test_unknown_peaks_have_no_share() -> None:
    measured, cost = Performance(small_config(), CPU, ranks=1), no_cost()
    measured.count(4, 0)
    time.sleep(0.001)
    found = measured.fetch(0.0, cost)
    assert found["mfu"] is None and measured.account(cost)["mfu"] is None
    assert found["model_tflops"]


def test_peak_memory_of_a_process_sees_an_allocation() -> None:
    measured = Performance(small_config(), CPU, ranks=1)
    before = measured.peak_memory()
    more = torch.ones(before // 4 + (1 << 24))  # all the memory of before once more
    assert measured.peak_memory() > before + 4 * (1 << 24) / 2 and len(more)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_peak_memory_of_a_gpu_is_that_of_the_interval() -> None:
    measured, cost = Performance(small_config(), torch.device("cuda"), ranks=1), no_cost()
    large = torch.ones(1 << 28, device="cuda")
    del large
    assert (measured.fetch(0.0, cost)["peak_memory_gb"] or 0.0) >= 4 * (1 << 28) / 1e9
    assert (measured.fetch(0.0, cost)["peak_memory_gb"] or 0.0) < 4 * (1 << 28) / 1e9
    assert cost["peak_memory_gb"] >= 4 * (1 << 28) / 1e9


def test_checkpoints_from_before_these_measures_are_read() -> None:
    extra = Position().as_extra()
    extra["cost"] = {"train_seconds": 3.0, "wall_seconds": 4.0}
    assert Position.from_extra(extra).cost == no_cost() | extra["cost"]
