"""How fast the training is and what it takes: rates, waits, memory, and the share of what the device can do."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import TypeVar

import torch
from torch.profiler import record_function

from trainer.config import Config, Precision
from trainer.steps import forward_flops

GB = 1e9
TERA = 1e12
TRAINING = 3  # forward passes that a training step counts as: its backward pass is worth two (Kaplan et al. 2020, 2.1)
T = TypeVar("T")

# Dense peaks in TFLOP/s from the vendor's data sheets, accumulating in fp32: bf16, fp16, TF32, fp32; None: no unit for
# it. A card is known by the words of its name; of two entries the first counts.
_PEAKS: tuple[tuple[str, float | None, float, float | None, float], ...] = (
    ("B200", 2250.0, 2250.0, 1125.0, 75.0),
    ("H200 NVL", 835.5, 835.5, 417.5, 60.0),
    ("H200", 989.5, 989.5, 494.5, 67.0),
    ("GH200", 989.5, 989.5, 494.5, 67.0),
    ("H100 PCIe", 756.0, 756.0, 378.0, 51.0),
    ("H100 NVL", 835.5, 835.5, 417.5, 60.0),
    ("H100", 989.5, 989.5, 494.5, 67.0),
    ("A100", 312.0, 312.0, 156.0, 19.5),
    ("A40", 149.7, 149.7, 74.8, 37.4),
    ("A30", 165.0, 165.0, 82.0, 10.3),
    ("A10", 125.0, 125.0, 62.5, 31.2),
    ("L40S", 362.0, 362.0, 183.0, 91.6),
    ("L40", 181.0, 181.0, 90.5, 90.5),
    ("L4", 121.0, 121.0, 60.0, 30.3),
    ("A6000", 154.8, 154.8, 77.4, 38.7),
    ("RTX 5090", 209.5, 209.5, 104.8, 104.8),
    ("RTX 4090", 165.2, 165.2, 82.6, 82.6),
    ("RTX 3090", 71.0, 71.0, 35.6, 35.6),
    ("V100 SXM2", None, 125.0, None, 15.7),
    ("V100 SXM3", None, 125.0, None, 15.7),
    ("V100 PCIE", None, 112.0, None, 14.0),
    ("V100S", None, 130.0, None, 16.4),
    ("T4", None, 65.0, None, 8.1),
)
# A part of a card, or a slower one that shares the name.
_OTHERS = {"mig", "laptop", "max", "d", "ti"}


def peak_tflops(name: str, precision: Precision, tf32: bool) -> float | None:
    """What a card can do at most, in TFLOP/s, by the name that CUDA gives it; None for one that is not known.

    Args:
        tf32: whether fp32 convolutions may use TF32, which is torch's default.
    """
    words = set(re.split(r"[ \-]+", name.lower()))
    if words & _OTHERS:
        return None
    for card, bf16, fp16, fast32, fp32 in _PEAKS:
        if set(card.lower().split()) <= words:
            peaks = {Precision.bf16: bf16, Precision.fp16: fp16, Precision.fp32: (fast32 if tf32 else None) or fp32}
            return peaks[precision]
    return None


def device_peak(config: Config, device: torch.device) -> float | None:
    """Peak of this device in TFLOP/s at the run's precision: `train.peak_tflops`, or from the table; None: unknown."""
    if config.train.peak_tflops:
        return config.train.peak_tflops
    if device.type != "cuda":
        return None
    return peak_tflops(torch.cuda.get_device_name(device), config.train.precision, torch.backends.cudnn.allow_tf32)


class Performance:
    """What is measured between two logs. Counting waits for nothing; `fetch` is to follow a wait for the device.

    Rates and shares are of this rank's device, `images_per_second` of all ranks.
    """

    def __init__(self, config: Config, device: torch.device, ranks: int) -> None:
        self._config, self._device, self._ranks = config, device, ranks
        self.peak = device_peak(config, device)
        self.start()

    def start(self, starved: float = 0.0) -> None:
        """An interval begins; `starved`: seconds that the task has waited for replay so far."""
        self._began, self._starved = time.perf_counter(), starved
        self._waited, self._images, self._pairs = 0.0, 0, 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def timed(self, batches: Iterable[T]) -> Iterator[T]:
        """The same batches; what the loop stands waiting for them is counted."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            try:
                with record_function("data"):
                    batch = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - began
            yield batch

    def count(self, images: int, points: int) -> None:
        """A step has taken this rank's `images` real images and `points` replay points through the model."""
        self._images += images
        self._pairs += images + points

    def fetch(self, starved: float, cost: dict[str, float]) -> dict[str, float | None]:
        """The measures since the last fetch, which also go into the account of the run; the next interval begins.

        Args:
            starved: seconds that the task has waited for replay so far.
            cost: the sums `data_wait_seconds` and `model_tflop`, and the maximum `peak_memory_gb`, of all attempts.

        Returns:
            images_per_second; data_wait_seconds and replay_wait_seconds of the interval; peak_memory_gb, which is the
            most that tensors held on a GPU in the interval, or that the process did on a CPU since it began;
            model_tflops, achieved; and mfu, its share of the device's peak (null: not known). Both by the convention
            of PaLM (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): only what the model itself needs counts,
            three forward passes for each pair, and nothing that is computed again.
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        tflop = TRAINING * self._forward * self._pairs / TERA
        memory = self.peak_memory() / GB
        cost["data_wait_seconds"] += self._waited
        cost["model_tflop"] += tflop
        cost["peak_memory_gb"] = max(cost["peak_memory_gb"], memory)
        measures = {
            "images_per_second": self._images * self._ranks / seconds,
            "data_wait_seconds": self._waited,
            "replay_wait_seconds": starved - self._starved,
            "peak_memory_gb": memory,
            "model_tflops": tflop / seconds,
            "mfu": self.share(tflop / seconds),
        }
        self.start(starved)
        return measures

    def account(self, cost: dict[str, float]) -> dict[str, float | None]:
        """The same over all attempts, for metrics.json; `cost` as `fetch` keeps it, with `train_seconds`."""
        tflops = cost["model_tflop"] / max(cost["train_seconds"], 1e-9)
        kept = {name: cost[name] for name in ("data_wait_seconds", "peak_memory_gb")}
        return {**kept, "model_tflops": tflops, "mfu": self.share(tflops)}

    def share(self, tflops: float) -> float | None:
        """Of the device's peak."""
        return None if self.peak is None else tflops / self.peak

    def peak_memory(self) -> int:
        """Bytes; see `fetch`."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # Linux counts in KiB

    @cached_property
    def _forward(self) -> int:
        return forward_flops(self._config)
