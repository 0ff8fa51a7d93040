"""DDIM sampling (Song et al. 2021) as a stream of steps, with no host synchronisation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import Prediction
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.kernels.ddim import ddim_update
from trainer.kernels.philox import fold_in, uniform

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class DDIMStep:
    """One step from x at timestep t to x_next at the next timestep of the grid; of the last one x_next is the sample.

    Images (B, C, H, W) in fp32, t int64 (B,). `prediction` is the model's, in its own type, at x and its label: what a
    path is guided by does not enter it. `x0` is the predicted x_0 (clipped where clipping is on), where asked for.
    """

    x: Tensor
    t: Tensor
    prediction: Tensor
    x_next: Tensor
    x0: Tensor | None


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


@dataclass(frozen=True)
class DDIMPlan:
    """What a path knows before its first evaluation, on the device, step by step.

    t int64 (N, B); coefficients fp32 (N, 5, B), as `trainer.kernels.ddim.ddim_update` takes them; seeds of the noise
    that is added int64 (N, B), None where none is. The last step adds none.
    """

    t: Tensor
    coefficients: Tensor
    seeds: Tensor | None

    @property
    def steps(self) -> int:
        """N."""
        return self.t.shape[0]

    def seeds_of(self, step: int) -> Tensor | None:
        """(B,), or None where a step adds no noise."""
        return None if self.seeds is None or step + 1 == self.steps else self.seeds[step]


def plan_ddim(schedule: NoiseSchedule, grid: Tensor, noise_seeds: Tensor | None, batch: int, eta: float) -> DDIMPlan:
    """The plan of `ddim`, with its arguments; on the device of the schedule."""
    assert eta == 0.0 or noise_seeds is not None, "eta > 0 draws noise: give its seeds"
    t = grid.to(schedule.signal.device).expand(batch, -1).t().contiguous()
    seeds = None
    if noise_seeds is not None and eta > 0.0:
        seeds = torch.stack([fold_in(noise_seeds, step) for step in range(len(t))])
    return DDIMPlan(t, _coefficients(schedule, t, eta), seeds)


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
    guidance: float = 1.0,
    null_label: int | None = None,
    with_x0: bool = False,
) -> Iterator[DDIMStep]:
    """Walk the grid (Song et al. 2021, eq. 12 and 16), without gradients.

    Clipping bounds the predicted x_0 to [-1, 1] and keeps the predicted noise, as diffusers' DDIMScheduler does. Each
    point takes one model evaluation, two where the path is guided (Ho and Salimans 2022): one with the label and one
    with the null label, whose predictions enter the step as (1 - guidance) p_null + guidance p_label.

    Args:
        predict: (x (B, C, H, W), t int64 (B,), label) -> prediction of the schedule's kind, fp32, bf16 or fp16.
        schedule: on the device of x.
        x: start, unit normal, (B, C, H, W).
        label: int64 (B,) or None, handed to `predict`.
        grid: int64 (N,) or (B, N), descending (`timestep_grid`).
        eta: 0 deterministic, 1 as noisy as DDPM.
        clip: bound the predicted x_0.
        noise_seeds: int64 (B,), needed for eta > 0; step i adds the normals of `fold_in(noise_seeds, i)`.
        guidance: 1: none.
        null_label: what stands for no class, needed with guidance.
        with_x0: the steps say what x_0 they predict.
    """
    plan = plan_ddim(schedule, grid, noise_seeds, x.shape[0], eta)
    null: Tensor | None = None
    if guidance != 1.0:
        assert label is not None and null_label is not None, "guidance needs labels, and one that stands for none"
        null = torch.full_like(label, null_label)
    x = x.to(torch.float32)
    for i in range(plan.steps):
        t = plan.t[i]
        with torch.no_grad():
            prediction = predict(x, t, label)
            x_next, x0 = ddim_update(
                x,
                prediction,
                plan.coefficients[i],
                predict_v=schedule.prediction is Prediction.v,
                clip=clip,
                null_prediction=None if null is None else predict(x, t, null),
                guidance=guidance,
                seeds=plan.seeds_of(i),
                with_x0=with_x0,
            )
        yield DDIMStep(x, t, prediction, x_next, x0)
        x = x_next


def _coefficients(schedule: NoiseSchedule, t: Tensor, eta: float) -> Tensor:
    """Song et al. 2021, eq. 12 and 16, towards x_0 (signal 1, sigma 0) in the last step: t (N, B) -> (N, 5, B).

    With s, g for signal and sigma at t and s', g' at the next timestep: spread = eta (g' / g) sqrt(1 - (s / s')^2).
    The direction sqrt(g'^2 - spread^2) is written as a sum of positive terms,
    g'^2 (1 - eta^2) + (eta g'^2 s / (g s'))^2: near T the difference would leave nothing but rounding.
    """
    end = torch.ones_like(t[:1], dtype=torch.float32)
    signal, sigma = schedule.signal[t], schedule.sigma[t]
    signal_next = torch.cat([signal[1:], end])
    sigma_next = torch.cat([sigma[1:], torch.zeros_like(end)])
    spread = eta * sigma_next / sigma * (1.0 - (signal / signal_next).square()).clamp(min=0.0).sqrt()
    posterior = eta * sigma_next.square() * signal / (sigma * signal_next)
    direction = (sigma_next.square() * (1.0 - eta**2) + posterior.square()).clamp(min=0.0).sqrt()
    return torch.stack([signal, sigma, signal_next, direction, spread], dim=1)
