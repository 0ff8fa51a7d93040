"""Sampling for evaluation: a pure function of the index, whoever computes it; checked against diffusers' DDIM."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

from trainer.config import DiffusionConfig, ModelConfig
from trainer.diffusion.samplers import sample_path, timestep_grid
from trainer.diffusion.schedules import make_schedule
from trainer.evaluation.generate import (
    Sampling,
    asked_labels,
    balanced_count,
    generate,
    share_indices,
)
from trainer.kernels.philox import normal
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.seeds import derive

CPU = torch.device("cpu")
SCHEDULE = make_schedule(DiffusionConfig())
SAMPLING = Sampling(seed=5, draw=2, shape=(1, 8, 8), steps=5, batch=7)


def tiny(conditional: bool = True) -> Denoiser:
    torch.manual_seed(0)
    config = ModelConfig(channels=[8, 8], norm_groups=4, conditional=conditional)
    return build_denoiser(config, image_size=8, channels=1, max_classes=4)


def close(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding of single values, which another batch size may turn."""
    gap = (first.int() - second.int()).abs()
    return int(gap.max()) <= 1 and float((gap > 0).float().mean()) < 0.01


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_give_what_one_gives(world_size: int) -> None:
    model, count = tiny(), 20
    whole, asked = generate(model, SCHEDULE, [0, 2, 3], np.arange(count), SAMPLING, CPU)
    shares = [
        generate(model, SCHEDULE, [0, 2, 3], share_indices(count, rank, world_size), SAMPLING, CPU)
        for rank in range(world_size)
    ]
    assert len({len(images) for images, _ in shares}) == 1  # what gathering needs
    assert close(torch.cat([images for images, _ in shares])[:count], whole)
    assert asked is not None
    labels = torch.cat([labels for _, labels in shares if labels is not None])[:count]
    assert torch.equal(labels, asked) and asked.tolist() == [0, 2, 3] * 6 + [0, 2]
    assert whole.dtype == torch.uint8 and whole.shape == (count, 1, 8, 8)


def test_image_depends_on_seed_draw_and_index_but_not_on_the_batch() -> None:
    model, classes = tiny(), [0, 1]
    images, _ = generate(model, SCHEDULE, classes, np.arange(10), SAMPLING, CPU)
    one, _ = generate(model, SCHEDULE, classes, np.array([4]), SAMPLING, CPU)
    assert close(one[0], images[4])
    for other in (Sampling(6, 2, (1, 8, 8), 5), Sampling(5, 3, (1, 8, 8), 5)):
        assert not close(generate(model, SCHEDULE, classes, np.array([4]), other, CPU)[0], one)
    assert len({image.numpy().tobytes() for image in images}) == 10


def test_guided_samples_are_those_of_the_guided_path() -> None:
    torch.manual_seed(0)
    config = ModelConfig(channels=[8, 8], norm_groups=4, label_dropout=0.1)
    model = build_denoiser(config, image_size=8, channels=1, max_classes=4).eval()
    indices = np.arange(4)
    plain, asked = generate(model, SCHEDULE, [0, 2], indices, SAMPLING, CPU)
    guided, _ = generate(model, SCHEDULE, [0, 2], indices, replace(SAMPLING, guidance=2.5), CPU)
    assert asked is not None and not close(plain, guided)
    x = normal(torch.from_numpy(derive(5, "evaluation-start", indices.astype(np.uint64), 2)), (1, 8, 8))
    grid = timestep_grid(SCHEDULE.timesteps, 5)
    *_, last = sample_path(model, SCHEDULE, x, asked, grid, guidance=2.5, null_label=4)
    assert close(((last.x_next + 1) * 127.5).round().clamp(0, 255).to(torch.uint8), guided)


def test_unconditional_model_is_not_asked_and_mode_is_restored() -> None:
    model = tiny(conditional=False).train()
    images, asked = generate(model, SCHEDULE, [0, 1], np.arange(3), SAMPLING, CPU)
    assert asked is None and model.training and len(images) == 3
    model.eval()
    generate(model, SCHEDULE, [0, 1], np.arange(3), SAMPLING, CPU)
    assert not model.training


def test_diffusers_ddim_from_the_same_start() -> None:
    model, indices = tiny(), np.arange(6)
    images, asked = generate(model, SCHEDULE, [1, 3], indices, SAMPLING, CPU)
    reference = DDIMScheduler(
        num_train_timesteps=1000, timestep_spacing="trailing", clip_sample=True, set_alpha_to_one=True
    )
    reference.set_timesteps(SAMPLING.steps)
    x = normal(torch.from_numpy(derive(5, "evaluation-start", indices.astype(np.uint64), 2)), (1, 8, 8))
    with torch.no_grad():
        for t in reference.timesteps:
            x = reference.step(model(x, t.expand(6), asked), t, x).prev_sample  # pyright: ignore
    expected = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    assert close(images, expected)


def test_eta_adds_noise_that_is_repeatable() -> None:
    noisy = Sampling(5, 2, (1, 8, 8), 5, eta=1.0)
    first, second = (generate(tiny(), SCHEDULE, [0], np.arange(3), noisy, CPU)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not close(first, generate(tiny(), SCHEDULE, [0], np.arange(3), SAMPLING, CPU)[0])


def test_values_that_are_not_finite_become_grey() -> None:
    model = tiny()
    with torch.no_grad():
        model.unet.conv_out.weight.fill_(float("nan"))
    images, _ = generate(model, SCHEDULE, [0], np.arange(2), SAMPLING, CPU)
    assert set(images.unique().tolist()) == {128}


def test_balance_and_shares() -> None:
    assert balanced_count(2000, 10) == 2000 and balanced_count(2000, 6) == 2004 and balanced_count(1, 10) == 10
    labels = asked_labels([7, 3, 5], np.arange(balanced_count(20, 3)))
    assert np.unique(labels, return_counts=True)[1].tolist() == [7, 7, 7]
    parts = [share_indices(10, rank, 4) for rank in range(4)]
    assert np.concatenate(parts)[:10].tolist() == list(range(10)) and {len(part) for part in parts} == {3}
