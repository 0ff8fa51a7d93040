"""Tables against diffusers' schedulers and the closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from trainer.config import DiffusionConfig, Prediction, Schedule
from trainer.diffusion.schedules import make_schedule
from trainer.errors import ConfigError
from trainer.kernels.ddim import x0_and_noise
from trainer.kernels.noise import add_noise
from trainer.kernels.philox import normal

NAMES = {Schedule.linear: "linear", Schedule.cosine: "squaredcos_cap_v2"}


@pytest.mark.parametrize("kind", list(Schedule))
@pytest.mark.parametrize("timesteps", [1000, 100])
def test_tables_against_diffusers(kind: Schedule, timesteps: int) -> None:
    schedule = make_schedule(DiffusionConfig(timesteps=timesteps, schedule=kind))
    reference = DDPMScheduler(timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule=NAMES[kind])
    assert schedule.timesteps == timesteps and schedule.signal.dtype == schedule.sigma.dtype == torch.float32
    betas = reference.betas.double().numpy()
    alpha_bar = np.cumprod(1 - betas)  # theirs is rounded at each of the T products
    # Their betas are rounded to fp32, which leaves 1 - beta an error of 6e-8 at each timestep.
    tolerance = 3e-5 if kind is Schedule.linear else 2e-4
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), alpha_bar, rtol=tolerance, atol=1e-7)
    np.testing.assert_allclose(schedule.signal.square() + schedule.sigma.square(), 1.0, atol=2e-7)
    np.testing.assert_allclose(schedule.sigma.numpy(), np.sqrt(1 - alpha_bar), rtol=1e-3, atol=1e-7)
    assert bool((schedule.signal.diff() < 0).all())


def test_linear_closed_form() -> None:
    """log alpha_bar_t of the linear schedule, summed in float64 by numpy."""
    schedule = make_schedule(DiffusionConfig())
    log_alpha_bar = np.cumsum(np.log1p(-(1e-4 + (0.02 - 1e-4) * np.arange(1000) / 999)))
    np.testing.assert_allclose(schedule.signal.numpy(), np.exp(log_alpha_bar / 2), rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma.numpy(), np.sqrt(-np.expm1(log_alpha_bar)), rtol=1e-6)


def test_cosine_closed_form() -> None:
    """Nichol and Dhariwal 2021, eq. 17: the clip at 0.999 touches the last beta only."""
    schedule = make_schedule(DiffusionConfig(schedule=Schedule.cosine))
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedule.alpha_bar[:-1].numpy(), f[1:-1] / f[0], rtol=2e-6)
    np.testing.assert_allclose(schedule.alpha_bar[-1].numpy(), f[-2] / f[0] * 0.001, rtol=2e-6)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (DiffusionConfig(timesteps=1), "diffusion.timesteps"),
        (DiffusionConfig(beta_start=0.0), "diffusion.beta_start"),
        (DiffusionConfig(beta_end=1.0), "diffusion.beta_end"),
    ],
)
def test_impossible_schedules_are_refused(config: DiffusionConfig, key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        make_schedule(config)


@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("kind", list(Schedule))
def test_parameterisations(prediction: Prediction, kind: Schedule) -> None:
    """x_t and the target are diffusers' own, and x_0 and eps come back out of them."""
    schedule = make_schedule(DiffusionConfig(schedule=kind, prediction=prediction))
    reference = DDPMScheduler(1000, beta_schedule=NAMES[kind])
    x0 = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t, seeds = torch.tensor([0, 10, 300, 600, 900]), torch.arange(5)
    noise, predict_v = normal(seeds, (3, 4, 4)), prediction is Prediction.v
    tables = {"signal": schedule.signal, "sigma": schedule.sigma}
    x_t, target = add_noise(x0, seeds, t, **tables, flip=None, predict_v=predict_v, dtype=torch.float32)
    expected = reference.get_velocity(x0, noise, t) if predict_v else noise
    torch.testing.assert_close(target, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(x_t, reference.add_noise(x0, noise, t), rtol=0, atol=2e-5)
    here = {name: table[t][:, None, None, None] for name, table in tables.items()}
    x0_back, noise_back = x0_and_noise(x_t, target, **here, predict_v=predict_v)
    torch.testing.assert_close(x0_back, x0, rtol=0, atol=1e-4)
    torch.testing.assert_close(noise_back, noise, rtol=0, atol=1e-5)
