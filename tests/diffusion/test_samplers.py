"""DDIM against diffusers' scheduler and against a case with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from scipy import stats
from stand_in import NAMES, PREDICTIONS
from stand_in import stand_in as _predict
from stand_in import start as _start
from torch import Tensor

from trainer.config import DiffusionConfig, Prediction, Schedule
from trainer.diffusion.samplers import PathStep, Predict, sample_path, timestep_grid
from trainer.diffusion.schedules import NoiseSchedule, make_schedule
from trainer.errors import UserError
from trainer.kernels.philox import fold_in, normal


def _last(steps: list[PathStep]) -> Tensor:
    return steps[-1].x_next


@pytest.mark.parametrize("steps", [1, 2, 5, 10, 20, 30, 50, 100, 250, 1000])
def test_grid_is_diffusers_trailing(steps: int) -> None:
    scheduler = DDIMScheduler(1000, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    assert timestep_grid(1000, steps).tolist() == scheduler.timesteps.tolist()
    assert int(timestep_grid(1000, steps)[0]) == 999


@pytest.mark.parametrize("steps", [1, 7, 10, 61, 1000])
def test_jittered_grid(steps: int) -> None:
    """Each point but the first moves, inside its stratum; a path stays strictly descending."""
    grid = timestep_grid(1000, steps, torch.arange(500))
    assert grid.shape == (500, steps) and grid.dtype == torch.int64
    assert bool((grid[:, 0] == 999).all()) and int(grid.min()) >= 0
    edges = np.round(np.arange(steps - 1, -1, -1) * 999 / max(1, steps - 1))
    assert np.all(grid.numpy()[:, 1:] <= edges[:-1] - 1) and np.all(grid.numpy()[:, 1:] >= edges[1:])
    assert bool((grid.diff(dim=1) < 0).all())


def test_jitter_covers_what_lies_below_the_start_evenly_and_depends_on_its_seed_alone() -> None:
    grid = timestep_grid(1000, 10, torch.arange(20_000))
    assert stats.chisquare(np.bincount(grid[:, 1:].flatten().numpy(), minlength=999)).pvalue > 1e-3
    for point in (1, 5, 9):
        counts = np.bincount(grid[:, point].numpy() % 111, minlength=111)
        assert stats.chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef(grid[:, 4], grid[:, 5])[0, 1]) < 4 / 20_000**0.5
    assert torch.equal(timestep_grid(1000, 10, torch.tensor([77])), grid[77:78])


@pytest.mark.parametrize("steps", [0, 1001])
def test_impossible_steps_are_refused(steps: int) -> None:
    with pytest.raises(UserError, match="sampling steps"):
        timestep_grid(1000, steps)


@pytest.mark.parametrize("kind", list(Schedule))
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [10, 50])
def test_paths_against_diffusers(kind: Schedule, prediction: Prediction, eta: float, clip: bool, steps: int) -> None:
    schedule = make_schedule(DiffusionConfig(schedule=kind, prediction=prediction))
    scheduler = DDIMScheduler(
        1000,
        beta_schedule=NAMES[kind],
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip,
        timestep_spacing="trailing",
    )
    # In float64: their fp32 products lose five digits of the small alpha_bar near T.
    scheduler.alphas_cumprod = _alpha_bar(kind)
    scheduler.set_timesteps(steps)
    seeds, label = torch.tensor([5, -6, 7]), torch.tensor([0, 1, 2])
    grid = timestep_grid(1000, steps)
    path = list(
        sample_path(_predict, schedule, _start(), label, grid, eta=eta, clip=clip, noise_seeds=seeds, with_x0=clip)
    )
    assert len(path) == steps and torch.equal(path[0].x, _start())
    x = _start().double()
    for i, (step, t) in enumerate(zip(path, scheduler.timesteps, strict=True)):
        noise = normal(fold_in(seeds, i), (2, 4, 4)).double()
        prediction_here = _predict(x, t.expand(3), label)
        result = scheduler.step(prediction_here, int(t), x, eta=eta, variance_noise=noise)
        # Unclipped paths of this stand-in leave the unit range, on the cosine schedule by a factor of 2e4.
        scale = max(1.0, float(x.abs().max()), float(result.prev_sample.abs().max()))
        assert int(step.t[0]) == int(t)
        torch.testing.assert_close(step.prediction.double(), prediction_here, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(step.x_next.double(), result.prev_sample, rtol=0, atol=1e-5 * scale)
        assert (step.x0 is not None) == clip
        if step.x0 is not None:
            assert float(step.x0.abs().max()) <= 1.0
        x = result.prev_sample
        if i + 1 < steps:
            assert torch.equal(path[i + 1].x, step.x_next)


def _alpha_bar(kind: Schedule) -> Tensor:
    """float64 (1000,), by numpy."""
    if kind is Schedule.linear:
        return torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return torch.from_numpy(np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999)))


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_grids_of_their_own(eta: float) -> None:
    """A batch of jittered grids does what each sample does alone: bit for bit."""
    schedule, seeds, label = make_schedule(DiffusionConfig()), torch.tensor([3, 4, 5]), torch.tensor([0, 1, 2])
    grid = timestep_grid(1000, 7, torch.tensor([10, 20, 30]))
    together = list(sample_path(_predict, schedule, _start(), label, grid, eta=eta, noise_seeds=seeds))
    for i in range(3):
        one = slice(i, i + 1)
        alone = list(
            sample_path(_predict, schedule, _start()[one], label[one], grid[i], eta=eta, noise_seeds=seeds[one])
        )
        for a, b in zip(together, alone, strict=True):
            assert int(a.t[i]) == int(b.t[0]) and torch.equal(a.x_next[one], b.x_next)


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("guidance", [0.0, 0.5, 3.0])
def test_guided_paths_against_diffusers(prediction: Prediction, guidance: float) -> None:
    """Their step from (1 - s) p_null + s p_label; what a step hands out is the prediction with its label, unguided."""
    schedule = make_schedule(DiffusionConfig(prediction=prediction))
    scheduler = DDIMScheduler(1000, prediction_type=PREDICTIONS[prediction], timestep_spacing="trailing")
    scheduler.alphas_cumprod = _alpha_bar(Schedule.linear)
    scheduler.set_timesteps(10)
    label, asked = torch.tensor([0, 1, 2]), []

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        asked.append(label)
        return _predict(x, t, label)

    grid = timestep_grid(1000, 10)
    path = list(sample_path(predict, schedule, _start(), label, grid, guidance=guidance, null_label=9))
    assert len(asked) == 20 and all(torch.equal(null, torch.full((3,), 9)) for null in asked[1::2])
    x = _start().double()
    for step, t in zip(path, scheduler.timesteps, strict=True):
        with_label, without = (_predict(x, t.expand(3), classes) for classes in (label, torch.full((3,), 9)))
        guided = without + guidance * (with_label - without)
        x = scheduler.step(guided, int(t), x).prev_sample
        torch.testing.assert_close(step.prediction.double(), with_label, rtol=0, atol=1e-5)
        torch.testing.assert_close(step.x_next.double(), x, rtol=0, atol=3e-5)


def test_guidance_of_one_asks_for_nothing_more() -> None:
    """Neither a second evaluation nor a label that stands for none; the path is the plain one to the bit."""
    schedule, label, grid = make_schedule(DiffusionConfig()), torch.tensor([0, 1, 2]), timestep_grid(1000, 5)
    plain = list(sample_path(_predict, schedule, _start(), label, grid))
    guided = list(sample_path(_predict, schedule, _start(), label, grid, guidance=1.0, null_label=9))
    assert all(torch.equal(a.x_next, b.x_next) for a, b in zip(plain, guided, strict=True))


def _gaussian_predict(schedule: NoiseSchedule, mean: float, spread: float) -> Predict:
    """The optimal prediction where x_0 ~ N(mean, spread^2): E[eps | x_t], linear in x_t (and v from it)."""
    signal, sigma = schedule.signal.double(), schedule.sigma.double()

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        s, g = signal[t][:, None, None, None], sigma[t][:, None, None, None]
        noise = g * (x - s * mean) / (s.square() * spread**2 + g.square())
        return (noise if schedule.prediction is Prediction.epsilon else (noise - g * x) / s).float()

    return predict


@pytest.mark.parametrize("kind", list(Schedule))
@pytest.mark.parametrize("prediction", list(Prediction))
def test_gaussian_data(kind: Schedule, prediction: Prediction) -> None:
    """The probability-flow map of N(0, 1) to N(m, s^2) is x -> m + s x; DDIM tends to it with its steps."""
    schedule = make_schedule(DiffusionConfig(schedule=kind, prediction=prediction))
    predict, errors = _gaussian_predict(schedule, 0.3, 0.2), []
    start = torch.tensor([0.0, 1.0])[:, None, None, None]
    for steps in (100, 1000):
        x = _last(list(sample_path(predict, schedule, start, None, timestep_grid(1000, steps), clip=False)))
        mean, spread = float(x[0]), float(x[1] - x[0])
        errors.append(max(abs(mean - 0.3), abs(spread - 0.2)))
    # What is left at 1,000 steps: x_T of the linear schedule is not quite N(0, 1), signal_T = 0.006.
    assert errors[1] < 0.006 and errors[1] < errors[0] + 1e-4 and errors[0] < 0.03


def _ancestral_moments(mean: float, spread: float) -> tuple[float, float]:
    """Mean and deviation of x_0 by DDPM's posteriors (Ho et al. 2020, eq. 6 and 7) with the optimal x_0, in float64."""
    betas = np.linspace(1e-4, 0.02, 1000)
    alpha_bar = np.cumprod(1 - betas)
    m, variance = 0.0, 1.0
    for t in range(999, -1, -1):
        a, previous = alpha_bar[t], alpha_bar[t - 1] if t else 1.0
        gain = np.sqrt(a) * spread**2 / (a * spread**2 + 1 - a)  # E[x_0 | x_t] = mean + gain (x_t - sqrt(a) mean)
        to_x0 = np.sqrt(previous) * betas[t] / (1 - a)
        to_xt = np.sqrt(1 - betas[t]) * (1 - previous) / (1 - a)
        m = to_x0 * (mean + gain * (m - np.sqrt(a) * mean)) + to_xt * m
        variance = (to_x0 * gain + to_xt) ** 2 * variance + betas[t] * (1 - previous) / (1 - a)
    return m, variance**0.5


def test_gaussian_data_with_noise() -> None:
    """eta = 1 at every timestep is ancestral sampling; its moments are known exactly."""
    schedule, count = make_schedule(DiffusionConfig()), 4000
    seeds = torch.arange(count)
    start = normal(fold_in(seeds, 9999), (1, 1, 1))
    predict = _gaussian_predict(schedule, 0.3, 0.2)
    grid = timestep_grid(1000, 1000)
    x = _last(list(sample_path(predict, schedule, start, None, grid, eta=1.0, clip=False, noise_seeds=seeds)))
    mean, spread = _ancestral_moments(0.3, 0.2)
    assert abs(mean - 0.3) < 1e-3 and abs(spread - 0.2) < 5e-3
    assert abs(float(x.mean()) - mean) < 4 * spread / count**0.5
    assert abs(float(x.std()) - spread) < 4 * spread / (2 * count) ** 0.5
    assert abs(float(torch.corrcoef(torch.stack([x.flatten(), start.flatten()]))[0, 1])) < 0.1


def test_no_host_synchronisation_and_no_gradients() -> None:
    """Tensors without values walk the whole path: nothing in it asks the device for a number."""
    meta = torch.device("meta")
    schedule = make_schedule(DiffusionConfig()).to(meta)
    seeds = torch.empty(3, dtype=torch.int64, device=meta)
    grid = timestep_grid(1000, 4, seeds)
    path = list(sample_path(_predict, schedule, _start().to(meta), seeds, grid, eta=1.0, noise_seeds=seeds))
    assert len(path) == 4 and _last(path).shape == (3, 2, 4, 4)
    weight = torch.ones((), requires_grad=True)
    schedule = make_schedule(DiffusionConfig())
    for step in sample_path(lambda x, t, label: weight * x, schedule, _start(), None, timestep_grid(1000, 2)):
        assert torch.is_grad_enabled() and not step.x_next.requires_grad
