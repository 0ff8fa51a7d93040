"""Sampling by DDIM or DPM-Solver++ as a stream of steps, with no host synchronisation between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import Prediction, Solver
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.kernels.ddim import ddim_update
from trainer.kernels.philox import fold_in, uniform

# The largest ratio of a step of DPM-Solver++ to the one before it, in log(signal / sigma), that it extrapolates by.
# Grids without jitter stay below it where a step has eight timesteps or more. With jitter a step can be a hundred times
# as long as the one before, and what that extrapolates is above all the error of the predictions.
STEP_RATIO = 2.0

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class PathStep:
    """One step of a path, from x at timestep t to x_next at the next timestep of the grid, or to the sample.

    Images (B, C, H, W) in fp32, t int64 (B,). `prediction` is the model's, in its own type, at x and its label: what a
    path is guided by does not enter it. `x0` is the predicted x_0 (clipped where clipping is on), where asked for.
    """

    x: Tensor
    t: Tensor
    prediction: Tensor
    x_next: Tensor
    x0: Tensor | None


def timestep_grid(timesteps: int, steps: int, jitter_seeds: Tensor | None = None) -> Tensor:
    """The timesteps that a path visits on its way from T - 1 to x_0, descending.

    Point i = N ... 1 is round(i T / N) - 1: diffusers' "trailing" spacing (whose own sums can fall one timestep to
    the side of an exact tie, and give a point too many for some N that do not divide T). It starts at T - 1, where
    x_t is nearly the unit normal that sampling starts from: a path started lower with unit noise loses the image
    mean (Lin et al. 2024). With seeds, the N - 1 points after it are drawn from N - 1 equal strata of the timesteps
    below T - 1, one from each: a path stays in order, and many of them cover all those timesteps evenly.

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
    if jitter_seeds is None:
        return _edges(timesteps, steps)[:-1] - 1
    first = torch.full((len(jitter_seeds), 1), timesteps - 1, dtype=torch.int64, device=jitter_seeds.device)
    if steps == 1:
        return first
    edges = _edges(timesteps - 1, steps - 1).to(jitter_seeds.device)
    high, low = edges[:-1] - 1, edges[1:]
    offsets = (uniform(jitter_seeds, steps - 1) * (high - low + 1)).to(torch.int64)
    return torch.cat([first, torch.minimum(low + offsets, high)], dim=1)


def _edges(timesteps: int, parts: int) -> Tensor:
    """Where equal parts of the timesteps begin and end, descending, int64 (parts + 1,)."""
    return (torch.arange(parts, -1, -1, dtype=torch.float64) * timesteps / parts).round_().to(torch.int64)


@dataclass(frozen=True)
class PathPlan:
    """What a path knows before its first evaluation, on the device, step by step.

    t int64 (N, B); coefficients fp32 (N, 5, B), as `trainer.kernels.ddim.ddim_update` takes them; seeds of the noise
    that is added int64 (N, B), None where none is. The last step adds none. multistep fp32 (N, 3, B): what a step of
    DPM-Solver++ takes of x, of its x_0 and of the x_0 before; None for DDIM.
    """

    t: Tensor
    coefficients: Tensor
    seeds: Tensor | None
    multistep: Tensor | None = None

    @property
    def steps(self) -> int:
        """N."""
        return self.t.shape[0]

    def seeds_of(self, step: int) -> Tensor | None:
        """(B,), or None where a step adds no noise."""
        return None if self.seeds is None or step + 1 == self.steps else self.seeds[step]


def plan_path(
    schedule: NoiseSchedule,
    grid: Tensor,
    noise_seeds: Tensor | None,
    batch: int,
    eta: float = 0.0,
    solver: Solver = Solver.ddim,
) -> PathPlan:
    """The plan of `sample_path`, with its arguments; on the device of the schedule."""
    assert eta == 0.0 or noise_seeds is not None, "eta > 0 draws noise: give its seeds"
    assert eta == 0.0 or solver is Solver.ddim, "checked with the configuration"
    t = grid.to(schedule.signal.device).expand(batch, -1).t().contiguous()
    seeds = None
    if noise_seeds is not None and eta > 0.0:
        seeds = torch.stack([fold_in(noise_seeds, step) for step in range(len(t))])
    multistep = _multistep_weights(schedule, t) if solver is Solver.dpmpp else None
    return PathPlan(t, _coefficients(schedule, t, eta), seeds, multistep)


def sample_path(
    predict: Predict,
    schedule: NoiseSchedule,
    x: Tensor,
    label: Tensor | None,
    grid: Tensor,
    *,
    solver: Solver = Solver.ddim,
    eta: float = 0.0,
    clip: bool = True,
    noise_seeds: Tensor | None = None,
    guidance: float = 1.0,
    null_label: int | None = None,
    with_x0: bool = False,
) -> Iterator[PathStep]:
    """Walk the grid, without gradients, by DDIM (Song et al. 2021, eq. 12 and 16) or by DPM-Solver++(2M) (Lu et al.
    2022, arXiv 2211.01095, algorithm 2).

    Clipping bounds the predicted x_0 to [-1, 1]; DDIM keeps the predicted noise, as diffusers' DDIMScheduler does. Each
    point takes one model evaluation, two where the path is guided (Ho and Salimans 2022): one with the label and one
    with the null label, whose predictions enter the step as (1 - guidance) p_null + guidance p_label.

    Args:
        predict: (x (B, C, H, W), t int64 (B,), label) -> prediction of the schedule's kind, fp32, bf16 or fp16.
        schedule: on the device of x.
        x: start, unit normal, (B, C, H, W).
        label: int64 (B,) or None, handed to `predict`.
        grid: int64 (N,) or (B, N), descending (`timestep_grid`).
        solver: dpmpp is of second order, at one evaluation a step like DDIM; its first and last steps are DDIM's.
        eta: 0 deterministic, 1 as noisy as DDPM; with DDIM alone.
        clip: bound the predicted x_0.
        noise_seeds: int64 (B,), needed for eta > 0; step i adds the normals of `fold_in(noise_seeds, i)`.
        guidance: 1: none; else `null_label`, what stands for no class, is needed.
        with_x0: the steps say what x_0 they predict.
    """
    plan = plan_path(schedule, grid, noise_seeds, x.shape[0], eta, solver)
    null: Tensor | None = None
    if guidance != 1.0:
        assert label is not None and null_label is not None, "guidance needs labels, and one that stands for none"
        null = torch.full_like(label, null_label)
    x, before = x.to(torch.float32), None
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
                with_x0=with_x0 or plan.multistep is not None,
            )
            if plan.multistep is not None and x0 is not None:
                x_next, before = _multistep(plan.multistep[i], x, x0, before), x0
        yield PathStep(x, t, prediction, x_next, x0 if with_x0 else None)
        x = x_next


def _multistep(weights: Tensor, x: Tensor, x0: Tensor, before: Tensor | None) -> Tensor:
    """One step of DPM-Solver++: a linear combination with weights (3, B)."""
    of_x, of_x0, of_before = weights.view(3, -1, 1, 1, 1)
    x_next = (of_x * x).addcmul_(of_x0, x0)
    return x_next if before is None else x_next.addcmul_(of_before, before)


def _multistep_weights(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """Lu et al. 2022 (arXiv 2211.01095), algorithm 2, towards x_0 in the last step: t (N, B) -> (N, 3, B).

    With s, g for signal and sigma at t, s', g' at the next timestep, lambda = log(s / g) and h = lambda' - lambda:
    x' = (g' / g) x + (s' - s g' / g) D, where D = x_0 + (x_0 - x_0 before) h / (2 h before). The first step has no x_0
    before, and in the last one h is infinite: there D = x_0. h / h before is bounded by STEP_RATIO.
    """
    signal, sigma = schedule.signal.double()[t], schedule.sigma.double()[t]
    signal_next = torch.cat([signal[1:], torch.ones_like(signal[:1])])
    ratio = torch.cat([sigma[1:], torch.zeros_like(sigma[:1])]) / sigma
    gain = signal_next - signal * ratio
    h = (signal.log() - sigma.log()).diff(dim=0)
    extrapolation = torch.zeros_like(gain)
    extrapolation[1:-1] = (h[1:] / h[:-1]).clamp(max=STEP_RATIO) / 2.0
    return torch.stack([ratio, gain * (1.0 + extrapolation), -gain * extrapolation], dim=1).to(torch.float32)


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
