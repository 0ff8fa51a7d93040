"""A run directory with a tiny real teacher, and requests of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import Config
from trainer.models.denoiser import build_denoiser
from trainer.models.teacher import save_teacher
from trainer.replay.request import ReplayRequest, make_request, write_request
from trainer.replay.sidecar import Sampler
from trainer.replay.state import write_state
from trainer.run import RunDir

CLASSES = [7, 3, 5]
MakeConfig = Callable[..., Config]


def tiny_config(**replay: Any) -> Config:
    """8x8 images, 60 timesteps, 4 DDIM steps; shards of 6 trajectories with 3 points in micro-batches of 4."""
    config = Config()
    config.data.image_size, config.data.channels, config.data.classes = 8, 1, 10
    config.model.channels, config.model.norm_groups, config.model.max_classes = [8, 16], 4, 10
    config.diffusion.timesteps = 60
    config.train.global_batch = 8
    config.train.images_per_task = 8 * 20
    config.replay.steps, config.replay.points_per_trajectory = 4, 3
    config.replay.shard_trajectories, config.replay.sampler_batch = 6, 4
    config.replay.timeout = 20.0
    for name, value in replay.items():
        assert hasattr(config.replay, name)
        setattr(config.replay, name, value)
    return config


def add_teacher(run: RunDir, config: Config, task: int = 1, seed: int = 0) -> Any:
    """A teacher with random weights, also in the last layer, so that its predictions are not zero."""
    torch.manual_seed(seed)
    model = build_denoiser(config.model, image_size=8, channels=1, max_classes=10)
    return save_teacher(
        run.teacher(task),
        {name: tensor.detach().float() for name, tensor in model.state_dict().items()},
        task=task,
        classes=CLASSES,
        model=config.model,
        diffusion=config.diffusion,
        image_size=8,
        channels=1,
        max_classes=10,
        class_names=[str(label) for label in range(10)],
    )


class Workplace:
    """A run that learns its second task."""

    def __init__(self, root: Path, config: Config) -> None:
        self.run, self.config = RunDir(root), config
        self.card = add_teacher(self.run, config)
        self.request = self.ask()

    def ask(self, steps: int = 20) -> ReplayRequest:
        request = make_request(self.config, self.run, 2, CLASSES, self.card, steps)
        write_request(self.run, request)
        write_state(self.run, 2)
        return request

    def sampler(self, worker: int = 0, workers: int = 1) -> Sampler:
        return Sampler(self.run, worker, workers, torch.device("cpu"))

    def fill(self, shards: int = 1 << 30) -> int:
        """Make up to so many shards in this process; how many."""
        sampler = self.sampler()
        made = 0
        while made < shards:
            request = sampler.current_request()
            assert request is not None
            shard = sampler.next_shard(request)
            if shard is None:
                break
            sampler.make_shard(request, shard)
            made += 1
        return made

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.run.replay(2).glob("*.tar"))}


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path / "run", tiny_config())


@pytest.fixture
def make_workplace(tmp_path: Path) -> Callable[..., Workplace]:
    """Workplaces by name and replay settings; `unconditional`, `method`, `label_dropout`, `on_starved` as needed."""

    def make(
        name: str = "run", *, method: Any = None, unconditional: bool = False, label_dropout: float = 0.0, **replay: Any
    ) -> Workplace:
        config = tiny_config(**replay)
        config.model.label_dropout = label_dropout
        if method is not None:
            config.method.name = method
        config.model.conditional = not unconditional
        return Workplace(tmp_path / name, config)

    return make
