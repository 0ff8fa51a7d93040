"""The variational bound: each term against diffusers, SciPy and torch.distributions, the sum against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from scipy.stats import norm
from torch.distributions import Normal, kl_divergence

from trainer.config import DiffusionConfig, Schedule
from trainer.diffusion.likelihood import Posterior, decoder_term, prior_term, step_term, timestep_strata
from trainer.diffusion.schedules import betas, make_schedule

SHAPE = (16, 1, 4, 4)
NAMES = {Schedule.linear: "linear", Schedule.cosine: "squaredcos_cap_v2"}


def pixels(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Images of all 256 values, in [-1, 1], float64."""
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape)).double() / 127.5 - 1.0


def normals(seed: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@pytest.mark.parametrize("kind", list(Schedule))
@pytest.mark.parametrize("timesteps", [1000, 50])
def test_a_step_is_the_divergence_of_diffusers_gaussians(kind: Schedule, timesteps: int) -> None:
    """Means from DDPMScheduler.step (the same noise cancels), variance beta~ from it: KL written out in float64."""
    config = DiffusionConfig(timesteps=timesteps, schedule=kind)
    posterior = Posterior.of(config)
    scheduler = DDPMScheduler(
        timesteps,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=NAMES[kind],
        clip_sample=False,
        prediction_type="sample",
    )
    scheduler.betas = betas(config)  # its own are rounded to fp32
    scheduler.alphas = 1.0 - scheduler.betas
    scheduler.alphas_cumprod = scheduler.alphas.cumprod(0)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    x0, guess, x_t = pixels(0), pixels(1), normals(2)
    for t in (1, 2, timesteps // 2, timesteps - 1):
        means = []
        for x in (x0, guess):
            step = scheduler.step(x, t, x_t, generator=torch.Generator().manual_seed(0))  # pyright: ignore
            means.append(step.prev_sample)
        deviation = scheduler._get_variance(t, variance_type="fixed_small").sqrt()
        expected = kl_divergence(Normal(means[0], deviation), Normal(means[1], deviation)).sum(dim=(1, 2, 3))
        found = step_term(x0, guess, torch.full((len(x0),), t), posterior)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=0.0)


@pytest.mark.parametrize("kind", list(Schedule))
def test_the_prior_is_the_divergence_from_the_unit_normal(kind: Schedule) -> None:
    config = DiffusionConfig(timesteps=50, schedule=kind)
    x0 = pixels(0)
    alpha_bar = (1.0 - betas(config)).prod()
    expected = kl_divergence(Normal(alpha_bar.sqrt() * x0, (1 - alpha_bar).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(prior_term(x0, Posterior.of(config)), expected.sum(dim=(1, 2, 3)))


def test_the_decoder_is_scipys_probability_of_a_pixel_value() -> None:
    posterior = Posterior.of(DiffusionConfig())
    scale = math.sqrt(float(posterior.variance[1]))
    x0 = pixels(0)
    x0[0, 0, 0, :] = torch.tensor([-1.0, -1.0, 1.0, 1.0])  # the outermost values, approached from both sides
    guess = x0 + 3.0 * scale * normals(1)
    low = norm.cdf((np.where(x0 < -0.999, -np.inf, x0 - 1 / 255) - guess.numpy()) / scale)
    high = norm.cdf((np.where(x0 > 0.999, np.inf, x0 + 1 / 255) - guess.numpy()) / scale)
    sure = high - low > 1e-9  # below, SciPy's difference has lost its digits
    assert sure.mean() > 0.95
    one = torch.from_numpy(sure)
    found = decoder_term(x0[one].view(-1, 1, 1, 1), guess[one].view(-1, 1, 1, 1), posterior)
    np.testing.assert_allclose(found.numpy(), -np.log((high - low)[sure]), rtol=1e-6, atol=1e-9)


def test_the_decoder_shares_out_all_probability_and_stays_finite_far_off() -> None:
    posterior = Posterior.of(DiffusionConfig())
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1.0).view(-1, 1, 1, 1)
    for mean in (-1.02, -1.0, -0.3, 0.001, 0.999, 1.05):
        total = torch.exp(-decoder_term(values, torch.full_like(values, mean), posterior)).sum()
        assert float(total) == pytest.approx(1.0, abs=1e-9)
    far = float(decoder_term(-torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), posterior))
    scale = math.sqrt(float(posterior.variance[1]))
    assert far == pytest.approx(-norm.logcdf((-2.0 + 1 / 255) / scale), rel=1e-9)


def gaussian_bound(config: DiffusionConfig, count: int, deviation: float) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Monte Carlo terms (nats a pixel) of pixels from N(0, deviation^2), predicted by their exact posterior mean."""
    schedule, posterior = make_schedule(config), Posterior.of(config)
    x0 = (deviation * normals(0, (count, 1, 1, 1)) * 127.5 + 127.5).round().clamp(0, 255) / 127.5 - 1.0
    terms = {}
    for t in range(config.timesteps):
        signal, sigma = schedule.signal[t].double(), schedule.sigma[t].double()
        x_t = signal * x0 + sigma * normals(t + 1, x0.shape)
        exact = signal * deviation**2 / (signal**2 * deviation**2 + sigma**2) * x_t
        label = torch.full((count,), t)
        found = step_term(x0, exact, label, posterior) if t else decoder_term(x0, exact, posterior)
        terms[t] = found.numpy()
    return terms, prior_term(x0, posterior).numpy()


def test_gaussian_pixels_with_the_exact_predictor_have_closed_forms() -> None:
    """E |x_0 - E[x_0 | x_t]|^2 = s^2 sigma^2 / (signal^2 s^2 + sigma^2); the sum bounds the entropy from above."""
    config, deviation, count = DiffusionConfig(), 0.25, 1000
    terms, prior = gaussian_bound(config, count, deviation)
    alpha_bar = np.cumprod(1.0 - betas(config).numpy())
    beta, before = betas(config).numpy(), np.concatenate([[1.0], alpha_bar[:-1]])
    for t in range(1, config.timesteps):
        error = deviation**2 * (1 - alpha_bar[t]) / (alpha_bar[t] * deviation**2 + 1 - alpha_bar[t])
        small = beta[t] * (1 - before[t]) / (1 - alpha_bar[t])
        expected = before[t] * beta[t] ** 2 / (1 - alpha_bar[t]) ** 2 * error / (2 * small)
        spread = terms[t].std() / math.sqrt(count)
        assert abs(terms[t].mean() - expected) < 4.5 * spread, t
    bits = (sum(term.mean() for term in terms.values()) + prior.mean()) / math.log(2)
    entropy = math.log2(deviation * math.sqrt(2 * math.pi * math.e) * 127.5)  # of N(0, s^2) in steps of 1 / 127.5
    assert entropy < bits < entropy + 1.0  # the first steps' true variance is above beta~: that is the gap


@pytest.mark.parametrize(("timesteps", "count"), [(1000, 100), (1000, 999), (1000, 5000), (20, 7), (2, 3)])
def test_strata_hold_each_timestep_once_and_are_narrow_where_terms_are_large(timesteps: int, count: int) -> None:
    edges = timestep_strata(timesteps, count)
    widths = edges.diff()
    assert int(edges[0]) == 1 and int(edges[-1]) == timesteps and len(widths) == min(count, timesteps - 1)
    assert bool((widths >= 1).all()) and int(widths[0]) == 1
    assert widths[-1] >= widths[0] and int(widths.max()) <= 2 * math.ceil((timesteps - 1) / len(widths))
