"""How long training stands still for a checkpoint: written while it waits, and written in the background.

python benchmarks/checkpoint.py [--config digits.yaml] [--saves N] [--json FILE] [section.key=value ...]

One rank. By default a model of about 100 M parameters in fp32 with its two moments and its EMA, and a small batch.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from trainer.cli import Parser, positive, run_main
from trainer.config import Config
from trainer.engine import Engine
from trainer.settings import load_config
from trainer.steps import count_parameters, fresh_model
from trainer.world import World, join_world

PACKAGES = ("torch", "deepspeed", "diffusers", "safetensors")
DEFAULTS = ["model.channels=[256,512,768]", "train.global_batch=4", "ema.decay=0.999"]
QUIET_STEPS = 5


class Training:
    """Steps on noise: what a step costs does not depend on what is learnt."""

    def __init__(self, config: Config, world: World) -> None:
        self.engine = Engine(fresh_model(config), config, world)
        data, batch = config.data, config.train.global_batch
        self._x = torch.randn(batch, data.channels, data.image_size, data.image_size, device=world.device)
        self._x = self._x.to(self.engine.dtype)
        self._t = torch.arange(batch, device=world.device) % config.diffusion.timesteps
        self._label = torch.arange(batch, device=world.device) % data.classes if config.model.conditional else None

    def step(self) -> float:
        """Seconds of one step, to its end on the device."""
        began = time.perf_counter()
        self.engine.backward(self.engine.model(self._x, self._t, self._label).float().square().mean())
        self.engine.step()
        self.engine.skips()  # waits for the device
        return time.perf_counter() - began


def save_waiting(training: Training, directory: Path) -> dict[str, float]:
    """Training waits until the checkpoint is published."""
    began, used = time.perf_counter(), time.process_time()
    training.engine.save(directory, {})
    training.engine.flush()
    return {
        "waiting_standstill": time.perf_counter() - began,
        "waiting_cpu": time.process_time() - used,
    }


def save_training_on(training: Training, directory: Path) -> dict[str, float]:
    """Training goes on while the checkpoint is written."""
    training.engine.published()
    began, used = time.perf_counter(), time.process_time()
    training.engine.save(directory, {})
    standstill, used = time.perf_counter() - began, time.process_time() - used
    steps = list[float]()
    while not training.engine.published():
        steps.append(training.step())
    return {
        "standstill": standstill,
        "standstill_cpu": used,
        "published_after": time.perf_counter() - began,
        "step_while_writing": median(steps) if steps else 0.0,
        "steps_while_writing": len(steps),
    }


def measure(config: Config, saves: int) -> dict[str, float]:
    """Medians over `saves` checkpoints of each kind, in seconds; `cpu`: what a core worked, whatever else ran on it."""
    training = Training(config, join_world(0, config.train.threads))
    training.step()  # the first one makes the moments
    quiet = median(training.step() for _ in range(QUIET_STEPS))
    measured = list[dict[str, float]]()
    with tempfile.TemporaryDirectory(prefix="checkpoint-", dir=Path.cwd()) as place:
        for number in range(saves):
            waited = save_waiting(training, Path(place) / f"waiting-{number}")
            measured.append(waited | save_training_on(training, Path(place) / f"background-{number}"))
        size = sum(path.stat().st_size for path in (Path(place) / "background-0").iterdir())
        training.engine.close()
    result = {name: round(median(entry[name] for entry in measured), 3) for name in measured[0]}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"checkpoint_bytes": size, "step": round(quiet, 3), **result, "peak_memory_bytes": peak}


def main(argv: list[str]) -> int:
    """Measure and print."""
    parser = Parser(description="Measure how long training stands still for a checkpoint.")
    parser.add_argument("--config", default="digits.yaml", metavar="FILE", help="a path, or a name in configs/")
    parser.add_argument("--saves", type=positive, default=3, metavar="N", help="checkpoints of each kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the numbers go")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="win over the file")
    options = parser.parse_intermixed_args(argv)
    config = load_config(options.config, [*DEFAULTS, *options.overrides])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/checkpoint.py", *argv]),
        "hardware": f"{os.cpu_count()} cores, {device}",
        "load_average": round(os.getloadavg()[0], 1),  # what else ran on those cores
        "versions": {name: version(name) for name in PACKAGES},
        "parameters": count_parameters(config),
        "zero_stage": config.zero.stage,
        "precision": config.train.precision.value,
        **measure(config, options.saves),
    }
    for key, value in result.items():
        print(f"{key:<20} {value}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    run_main(main)
