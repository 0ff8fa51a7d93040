"""How large what is timed is, as the program's own configuration, and the data it learns from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Config
from trainer.data.images import encode_image
from trainer.data.shards import DatasetCard, Sample, SplitIndex, task_directory, write_card, write_index, write_shard
from trainer.settings import load_config
from trainer.world import World

SHARD = 1000  # images
Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # x, t, label, target


@dataclass(frozen=True)
class Sizes:
    """What a benchmark runs. `batch` images per step, `images` stored of each of two tasks."""

    name: str
    image_size: int
    channels: tuple[int, ...]
    layers: int
    head_dim: int
    norm_groups: int
    classes: int
    batch: int
    images: int
    precision: str
    compile: bool
    readers: int
    sampler_batch: int
    shard_trajectories: int
    warm: int  # steps before the rounds, the first of which compiles
    rounds: int
    settle: int  # steps of a round before its time is taken
    steps: int  # of a round, at most
    seconds: float  # of a round, about, where a step is slow
    profiled: int
    autotune: bool = False

    @property
    def total_steps(self) -> int:
        """Steps that a contender takes at most, in the two parts in which it may be."""
        return self.warm + 2 * (self.rounds * (self.settle + self.steps) + 2 * self.profiled) + 2


CHANNELS = (128, 256, 384, 512)
SIZES = {
    # The U-Net of configs/imagenet100.yaml: 116 M parameters.
    "gpu": Sizes("gpu", 64, CHANNELS, 3, 64, 32, 100, 128, 4096, "bf16", True, 8, 256, 256, 6, 5, 4, 20, 2.0, 5),
    "cpu": Sizes("cpu", 16, (32, 64), 1, 16, 8, 10, 16, 512, "fp32", True, 1, 16, 32, 4, 5, 2, 10, 5.0, 3),
    "quick": Sizes("quick", 8, (8, 16), 1, 8, 4, 4, 8, 64, "fp32", False, 1, 8, 16, 3, 2, 1, 3, 5.0, 1),
}


def make_config(sizes: Sizes, directory: Path, name: str, **sections: dict[str, Any]) -> Config:
    """The configuration of a run of the program, loaded and checked as any other; `sections` win.

    Raises:
        ConfigError: what the program refuses.
    """
    values: dict[str, dict[str, Any]] = {
        "run": {"name": name, "dir": str(directory / "runs")},
        "data": {
            "name": "synthetic",
            "source": "npz",
            "root": str(directory / "data"),
            "classes": sizes.classes,
            "classes_per_task": sizes.classes // 2,
            "image_size": sizes.image_size,
            "channels": 3,
            "format": "raw",
            "flip": True,
            "workers": sizes.readers,
        },
        "model": {
            "channels": list(sizes.channels),
            "layers_per_block": sizes.layers,
            "attention_levels": list(range(len(sizes.channels) // 2, len(sizes.channels))),
            "attention_head_dim": sizes.head_dim,
            "norm_groups": sizes.norm_groups,
        },
        "optimizer": {"name": "adamw", "lr": 1e-4},
        "train": {
            "images_per_task": sizes.total_steps * sizes.batch,
            "global_batch": sizes.batch,
            "precision": sizes.precision,
            "compile": sizes.compile,
            "autotune": sizes.autotune,
            "threads": 0 if sizes.name == "gpu" else 1,
        },
        "ema": {"decay": 0.9999},
        "method": {"name": "generative_distillation"},
        "replay": {
            "placement": "external",
            "points_per_trajectory": 10,
            "shard_trajectories": sizes.shard_trajectories,
            "sampler_batch": sizes.sampler_batch,
            "precision": sizes.precision,
        },
        "tracking": {"progress": False},
    }
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    values["checkpoint"] = {"every_images": values["train"]["images_per_task"]}  # none while the time is taken
    path = directory / f"{name}-{os.getpid()}.yaml"
    path.write_text(json.dumps(values))  # JSON is YAML
    return load_config(str(path), [])


def write_dataset(config: Config, images_per_task: int) -> None:
    """Both tasks' training shards, raw uint8: random fields, coarse with some noise."""
    root, data = Path(config.data.root), config.data
    random = np.random.default_rng(0)
    for number, classes in enumerate(data.tasks, 1):
        directory, shards = task_directory(root, "train", number), []
        labels = [int(classes[row % len(classes)]) for row in range(images_per_task)]
        for start in range(0, images_per_task, SHARD):
            part = labels[start : start + SHARD]
            images = random_fields(random, len(part), data.image_size)
            samples = [
                Sample(f"train-{number}-{start + row:06d}", dict([encode_image(image, "raw"), ("cls", b"%d" % label)]))
                for row, (image, label) in enumerate(zip(images, part, strict=True))
            ]
            shards.append(write_shard(directory / f"{len(shards):05d}.tar", samples, part))
        write_index(
            directory, SplitIndex("synthetic", "train", number, data.image_size, 3, "raw", list(classes), shards)
        )
    names = [str(label) for label in range(data.classes)]
    write_card(root, DatasetCard("synthetic", data.image_size, 3, "raw", names, data.tasks))


def random_fields(random: np.random.Generator, count: int, size: int) -> NDArray[np.uint8]:
    """Images (count, size, size, 3)."""
    coarse = random.integers(0, 256, (count, -(-size // 8), -(-size // 8), 3)).repeat(8, axis=1).repeat(8, axis=2)
    noise = random.normal(0, 6, (count, size, size, 3))
    return np.clip(coarse[:, :size, :size] + noise, 0, 255).astype(np.uint8)


def random_images(sizes: Sizes, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images (count, 3, H, W) in [-1, 1] and labels (count,), drawn from torch's generator on the CPU."""
    images = torch.rand(count, 3, sizes.image_size, sizes.image_size) * 2 - 1
    return images.to(device), torch.randint(0, sizes.classes, (count,)).to(device)


def random_examples(sizes: Sizes, batches: int, seed: int, world: World, dtype: torch.dtype) -> list[Batch]:
    """This rank's share of some batches (x, t, label, target), a function of the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    shape = (sizes.batch, 3, sizes.image_size, sizes.image_size)
    share = slice(world.rank * sizes.batch // world.size, (world.rank + 1) * sizes.batch // world.size)
    made = list[Batch]()
    for _ in range(batches):
        x, target = (torch.randn(shape, generator=generator) for _ in range(2))
        t = torch.randint(0, 1000, (sizes.batch,), generator=generator)
        label = torch.randint(0, sizes.classes, (sizes.batch,), generator=generator)
        x, target = (values[share].to(world.device, dtype) for values in (x, target))
        made.append((x, t[share].to(world.device), label[share].to(world.device), target))
    return made
