"""A run directory whose second task has a request, a tiny teacher, and replay shards of random numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from trainer.config import Config
from trainer.models.denoiser import build_denoiser
from trainer.models.teacher import TeacherCard, save_teacher
from trainer.replay.pool import encode
from trainer.replay.request import ReplayRequest, make_request, write_request
from trainer.replay.trajectory import TrajectoryBatch
from trainer.run import RunDir

CLASSES = [7, 3, 5]


@dataclass(frozen=True)
class Workplace:
    run: RunDir
    config: Config
    card: TeacherCard
    request: ReplayRequest

    def encoded(self, shard: int) -> bytes:
        return encode(self.request, shard, [random_batch(self.request, shard)])[1]


def random_batch(request: ReplayRequest, shard: int) -> TrajectoryBatch:
    """Trajectories of the right shapes: what a teacher would sample does not matter here."""
    random = torch.Generator().manual_seed(shard)
    count, points, shape = request.shard_trajectories, request.points_per_trajectory, request.image_shape
    first = shard * count
    return TrajectoryBatch(
        indices=torch.arange(first, first + count).numpy(),
        label=torch.tensor([CLASSES[row % len(CLASSES)] for row in range(count)]),
        start_seeds=torch.randint(-(2**62), 2**62, (count,), generator=random),
        t=torch.randint(0, request.timesteps, (count, points), generator=random),
        seeds=torch.randint(-(2**62), 2**62, (count, points), generator=random),
        end=torch.randn(count, *shape, generator=random).half() if request.renoised_points else None,
        states=torch.randn(count, request.path_points, *shape, generator=random).half()
        if request.path_points
        else None,
        targets=torch.randn(count, points, *shape, generator=random).half(),
        evaluations=42,
    )


def tiny_config() -> Config:
    """4x4 images; shards of 4 trajectories with 2 points."""
    config = Config()
    config.data.image_size, config.data.channels, config.data.classes = 4, 1, 10
    config.model.channels, config.model.norm_groups, config.model.max_classes = [4], 4, 10
    config.diffusion.timesteps = 60
    config.train.global_batch, config.train.images_per_task = 8, 160
    config.replay.steps, config.replay.points_per_trajectory = 4, 2
    config.replay.shard_trajectories, config.replay.sampler_batch = 4, 4
    return config


@pytest.fixture
def workplace(tmp_path: Path) -> Workplace:
    run, config = RunDir(tmp_path / "run"), tiny_config()
    torch.manual_seed(0)
    model = build_denoiser(config.model, image_size=4, channels=1, max_classes=10)
    card = save_teacher(
        run.teacher(1),
        {name: tensor.detach().float() for name, tensor in model.state_dict().items()},
        task=1,
        classes=CLASSES,
        model=config.model,
        diffusion=config.diffusion,
        image_size=4,
        channels=1,
        max_classes=10,
        class_names=[str(label) for label in range(10)],
    )
    request = make_request(config, run, 2, CLASSES, card, 20)
    write_request(run, request)
    return Workplace(run, config, card, request)
