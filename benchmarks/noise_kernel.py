"""Times uint8 images -> (x_t, eps): PyTorch eager, torch.compile and the fused Triton kernel.

    python benchmarks/noise_kernel.py --json benchmarks/results/noise_kernel.json

Results are checked against float64 before anything is timed. Without CUDA only the CPU reference is timed.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.schedules import make_schedule
from trainer.kernels.noise import add_noise, add_noise_reference
from trainer.kernels.philox import normal_reference, timesteps, triton_kernels

AddNoise = Callable[..., tuple[Tensor, Tensor]]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.02}  # bfloat16: half a unit in the last place of values up to 5


def make_inputs(shape: tuple[int, int, int, int], device: torch.device) -> tuple[Tensor, ...]:
    """images, seeds, t, signal, sigma."""
    schedule = make_schedule(DiffusionConfig()).to(device)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    seeds = torch.arange(shape[0], device=device) * 0x9E3779B97F4A7C1
    return images, seeds, timesteps(seeds, schedule.timesteps), schedule.signal, schedule.sigma


def check(implementation: AddNoise, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> float:
    """The largest error of x_t against float64, whose noise comes from the CPU reference."""
    images, seeds, t, signal, sigma = (value[:64].cpu() if i < 3 else value.cpu() for i, value in enumerate(inputs))
    noise = normal_reference(seeds, tuple(images.shape[1:])).double()
    expected = signal.double()[t][:, None, None, None] * (images.double() / 127.5 - 1)
    expected += sigma.double()[t][:, None, None, None] * noise
    x, target = implementation(*inputs, flip=None, predict_v=False, dtype=dtype)
    error = (x[:64].cpu().double() - expected).abs().max().item()
    error = max(error, (target[:64].cpu().double() - noise).abs().max().item())
    if error > TOLERANCE[dtype]:
        sys.exit(f"wrong result: error {error:.3g} against float64")
    return error


def measure(implementation: AddNoise, inputs: tuple[Tensor, ...], dtype: torch.dtype, repeats: int) -> list[float]:
    """Seconds of each call, after five to warm up."""
    seconds: list[float] = []
    on_cuda = inputs[0].is_cuda
    for _ in range(repeats + 5):
        if on_cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        implementation(*inputs, flip=None, predict_v=False, dtype=dtype)
        if on_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds[5:]


def run(shape: tuple[int, int, int, int], repeats: int) -> list[dict[str, Any]]:
    """One row per implementation and output type."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    implementations: dict[str, AddNoise] = {"eager": add_noise_reference}
    if device.type == "cuda" and triton_kernels() is not None:
        implementations |= {"compiled": torch.compile(add_noise_reference), "triton": add_noise}
    elif device.type == "cpu":
        print("no CUDA device: timing the CPU reference only")
    inputs, rows = make_inputs(shape, device), []
    for dtype in (torch.float32, torch.bfloat16):
        for name, implementation in implementations.items():
            error = check(implementation, inputs, dtype)
            seconds = measure(implementation, inputs, dtype, repeats)
            quartiles = statistics.quantiles(seconds, n=4)
            row = {"implementation": name, "dtype": str(dtype).removeprefix("torch."), "max_error": error}
            row |= {"median_ms": statistics.median(seconds) * 1e3}
            row |= {"quartiles_ms": [quartiles[0] * 1e3, quartiles[2] * 1e3], "repeats": repeats}
            rows.append(row)
            print(f"{name:9} {row['dtype']:9} {row['median_ms']:9.3f} ms   error {error:.1e}")
    return rows


def describe(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Hardware, versions and the command."""
    kernels = triton_kernels()
    cuda = torch.cuda.is_available()
    return {
        "command": " ".join(["python", "benchmarks/noise_kernel.py", *sys.argv[1:]]),
        "device": torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": None if kernels is None else kernels.triton.__version__,
        "shape": list(shape),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", type=int, nargs=4, default=None, metavar=("B", "C", "H", "W"))
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    arguments = parser.parse_args()
    default = (8192, 3, 64, 64) if torch.cuda.is_available() else (128, 3, 32, 32)
    batch, channels, height, width = arguments.shape or default
    shape = (batch, channels, height, width)
    result = describe(shape) | {"rows": run(shape, arguments.repeats)}
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
