"""DDIM sampling (Song et al. 2021) as a stream of steps, with no host synchronisation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.diffusion.parameterisation import x0_and_noise
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.kernels.philox import fold_in, normal, uniform

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class DDIMStep:
    """One step from x at timestep t to x_next at the next timestep of the grid; of the last one x_next is the sample.

    Images (B, C, H, W) in fp32, t int64 (B,). `x0` is the predicted x_0 (clipped where clipping is on).
    """

    x: Tensor
    t: Tensor
    prediction: Tensor
    x_next: Tensor
    x0: Tensor


def timestep_grid(timesteps: int, steps: int, jitter_seeds: Tensor | None = None) -> Tensor:
    """The timesteps that a DDIM path visits on its way from T - 1 to x_0, descending.

    Point i = N ... 1 is round(i T / N) - 1: diffusers' "trailing" spacing (whose own sums can fall one timestep to
    the side of an exact tie, and give a point too many for some N that do not divide T). It starts at T - 1, where
    x_t is nearly the unit normal that sampling starts from: a path started lower with unit noise loses the image
    mean (Lin et al. 2024). With seeds, every point but the first is drawn from its stratum, the timesteps
    round((i - 1) T / N) ... round(i T / N) - 1, so a path stays in order and many of them cover the strata evenly.

    Args:
        timesteps: T.
        steps: N.
        jitter_seeds: int64 (B,), on any device.

    Returns:
        int64 (N,), or (B, N) with seeds, on their device.

    Raises:
        UserError: N is not in 1 ... T.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps: must be between 1 and the schedule's {timesteps} timesteps")
    edges = (torch.arange(steps, -1, -1, dtype=torch.float64) * timesteps / steps).round_().to(torch.int64)
    high, low = edges[:-1] - 1, edges[1:]
    if jitter_seeds is None:
        return high
    high, low = high.to(jitter_seeds.device), low.to(jitter_seeds.device)
    offsets = (uniform(jitter_seeds, steps) * (high - low + 1)).to(torch.int64)
    grid = torch.minimum(low + offsets, high)
    grid[:, 0] = timesteps - 1
    return grid


def ddim(
    predict: Predict,
    schedule: NoiseSchedule,
    x: Tensor,
    label: Tensor | None,
    grid: Tensor,
    *,
    eta: float = 0.0,
    clip: bool = True,
    noise_seeds: Tensor | None = None,
) -> Iterator[DDIMStep]:
    """Walk the grid (Song et al. 2021, eq. 12 and 16), one model evaluation per point, without gradients.

    Clipping bounds the predicted x_0 to [-1, 1] and keeps the predicted noise, as diffusers' DDIMScheduler does.

    Args:
        predict: (x (B, C, H, W), t int64 (B,), label) -> prediction of the schedule's kind, of any floating type.
        schedule: on the device of x.
        x: start, unit normal, (B, C, H, W).
        label: int64 (B,) or None, handed to `predict`.
        grid: int64 (N,) or (B, N), descending (`timestep_grid`).
        eta: 0 deterministic, 1 as noisy as DDPM.
        clip: bound the predicted x_0.
        noise_seeds: int64 (B,), needed for eta > 0; step i adds the normals of `fold_in(noise_seeds, i)`.
    """
    assert eta == 0.0 or noise_seeds is not None, "eta > 0 draws noise: give its seeds"
    grid_NB = grid.to(x.device).expand(x.shape[0], -1).t().contiguous()
    coefficients = _coefficients(schedule, grid_NB, eta)
    x = x.to(torch.float32)
    for i in range(grid_NB.shape[0]):
        t = grid_NB[i]
        with torch.no_grad():
            prediction = predict(x, t, label).to(torch.float32)
            x0, noise = x0_and_noise(schedule, x, prediction, t)
            if clip:
                x0 = x0.clamp(-1.0, 1.0)
            x_next = coefficients.signal[i] * x0 + coefficients.direction[i] * noise
            if noise_seeds is not None and eta > 0.0 and i + 1 < grid_NB.shape[0]:
                x_next = x_next + coefficients.spread[i] * normal(fold_in(noise_seeds, i), tuple(x.shape[1:]))
        yield DDIMStep(x, t, prediction, x_next, x0)
        x = x_next


@dataclass(frozen=True)
class _Coefficients:
    """x_next = signal x_0 + direction eps + spread z for each step, each fp32 (N, B, 1, 1, 1)."""

    signal: Tensor
    direction: Tensor
    spread: Tensor


def _coefficients(schedule: NoiseSchedule, grid_NB: Tensor, eta: float) -> _Coefficients:
    """Song et al. 2021, eq. 12 and 16, towards x_0 (signal 1, sigma 0) in the last step.

    With s, g for signal and sigma at t and s', g' at the next timestep: spread = eta (g' / g) sqrt(1 - (s / s')^2).
    The direction sqrt(g'^2 - spread^2) is written as a sum of positive terms,
    g'^2 (1 - eta^2) + (eta g'^2 s / (g s'))^2: near T the difference would leave nothing but rounding.
    """
    end = torch.ones_like(grid_NB[:1], dtype=torch.float32)
    signal, sigma = schedule.signal[grid_NB], schedule.sigma[grid_NB]
    signal_next = torch.cat([signal[1:], end])
    sigma_next = torch.cat([sigma[1:], torch.zeros_like(end)])
    spread = eta * sigma_next / sigma * (1.0 - (signal / signal_next).square()).clamp(min=0.0).sqrt()
    posterior = eta * sigma_next.square() * signal / (sigma * signal_next)
    direction = (sigma_next.square() * (1.0 - eta**2) + posterior.square()).clamp(min=0.0).sqrt()
    shape = (*grid_NB.shape, 1, 1, 1)
    return _Coefficients(signal_next.view(shape), direction.view(shape), spread.view(shape))
