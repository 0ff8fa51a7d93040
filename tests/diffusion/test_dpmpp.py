"""DPM-Solver++(2M) against diffusers' scheduler and against a case with a known answer."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from stand_in import NAMES, PREDICTIONS
from stand_in import stand_in as _predict
from stand_in import start as _start
from torch import Tensor

from trainer.config import DiffusionConfig, Prediction, Schedule, Solver
from trainer.diffusion.samplers import STEP_RATIO, PathStep, Predict, sample_path, timestep_grid
from trainer.diffusion.schedules import NoiseSchedule, make_schedule


def _path(predict: Predict, schedule: NoiseSchedule, start: Tensor, grid: Tensor, clip: bool = True) -> list[PathStep]:
    label = torch.arange(len(start))
    return list(sample_path(predict, schedule, start, label, grid, solver=Solver.dpmpp, clip=clip))


def _reference(kind: Schedule, prediction: Prediction, clip: bool, steps: int) -> DPMSolverMultistepScheduler:
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule=NAMES[kind],
        prediction_type=PREDICTIONS[prediction],
        solver_order=2,
        algorithm_type="dpmsolver++",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        thresholding=clip,
        sample_max_value=1.0,  # the threshold lies between 1 and this: x_0 is clipped to [-1, 1]
    )
    scheduler.set_timesteps(steps)
    # In float64: their fp32 products lose five digits of the small alpha_bar near T.
    alpha_bar = _alpha_bar(kind)[scheduler.timesteps]
    scheduler.sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt(), torch.zeros(1)])
    return scheduler


def _alpha_bar(kind: Schedule) -> Tensor:
    """float64 (1000,), by numpy."""
    if kind is Schedule.linear:
        return torch.from_numpy(np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)))
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    return torch.from_numpy(np.cumprod(1 - np.minimum(1 - f[1:] / f[:-1], 0.999)))


@pytest.mark.parametrize("kind", list(Schedule))
@pytest.mark.parametrize("prediction", list(Prediction))
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_paths_against_diffusers(kind: Schedule, prediction: Prediction, clip: bool, steps: int) -> None:
    schedule = make_schedule(DiffusionConfig(schedule=kind, prediction=prediction))
    scheduler = _reference(kind, prediction, clip, steps)
    path = _path(_predict, schedule, _start(), timestep_grid(1000, steps), clip)
    assert len(path) == steps and torch.equal(path[0].x, _start())
    x = _start().double()
    for i, (step, t) in enumerate(zip(path, scheduler.timesteps, strict=True)):
        prediction_here = _predict(x, t.expand(3), torch.arange(3))
        result = scheduler.step(prediction_here, t, x).prev_sample
        # Unclipped paths of this stand-in leave the unit range, on the cosine schedule by a factor of 2e4.
        scale = max(1.0, float(x.abs().max()), float(result.abs().max()))
        assert bool((step.t == t).all()) and step.x0 is None
        torch.testing.assert_close(step.prediction.double(), prediction_here, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(step.x_next.double(), result, rtol=0, atol=1e-5 * scale)
        x = result
        if i + 1 < steps:
            assert torch.equal(path[i + 1].x, step.x_next)


def test_x0_where_asked_for() -> None:
    schedule = make_schedule(DiffusionConfig())
    grid = timestep_grid(1000, 4)
    path = list(sample_path(_predict, schedule, _start(), None, grid, solver=Solver.dpmpp, with_x0=True))
    for step in path:
        signal, sigma = (table[step.t][:, None, None, None].double() for table in (schedule.signal, schedule.sigma))
        expected = ((step.x - sigma * step.prediction) / signal).clamp(-1, 1)
        assert step.x0 is not None
        torch.testing.assert_close(step.x0.double(), expected, rtol=0, atol=1e-4)
    assert path[-1].x0 is not None and torch.equal(path[-1].x_next, path[-1].x0)


def _gaussian(schedule: NoiseSchedule, mean: float, spread: float) -> Predict:
    """The optimal prediction where x_0 ~ N(mean, spread^2): E[eps | x_t], linear in x_t."""
    signal, sigma = schedule.signal.double(), schedule.sigma.double()

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        s, g = signal[t][:, None, None, None], sigma[t][:, None, None, None]
        return (g * (x - s * mean) / (s.square() * spread**2 + g.square())).float()

    return predict


def _errors(solver: Solver, counts: list[int]) -> list[float]:
    """Of paths over the first part of the schedule, against the probability flow itself.

    For N(m, s^2) data the flow keeps (x_t - signal_t m) / sqrt(signal_t^2 s^2 + sigma_t^2). It is followed along the
    middle of the schedule alone: the last step of a path, to x_0, is of the first order.
    """
    schedule = make_schedule(DiffusionConfig(timesteps=20_000, beta_start=5e-6, beta_end=1e-3))
    predict = _gaussian(schedule, 0.3, 0.2)
    first, last = 15_999, 7_999
    found = []
    for count in counts:
        grid = torch.linspace(first, last, count + 1).round().to(torch.int64)
        start = torch.tensor([-1.0, 0.5, 1.5])[:, None, None, None]
        path = list(sample_path(predict, schedule, start, None, grid, solver=solver, clip=False))
        end = path[-1].x.double()  # before the step to x_0
        s, g = schedule.signal.double(), schedule.sigma.double()
        width = [(s[t] ** 2 * 0.2**2 + g[t] ** 2).sqrt() for t in (first, last)]
        exact = s[last] * 0.3 + (start.double() - s[first] * 0.3) * width[1] / width[0]
        found.append(float((end - exact).abs().max()))
    return found


def test_second_order_where_ddim_is_of_the_first() -> None:
    """Twice the steps: a quarter of the error, where DDIM keeps half of it."""
    ddim, dpmpp = _errors(Solver.ddim, [10, 20, 40, 80]), _errors(Solver.dpmpp, [10, 20, 40, 80])
    for coarse, fine in pairwise(ddim):
        assert 1.7 < coarse / fine < 2.4
    for coarse, fine in pairwise(dpmpp):
        assert 3.2 < coarse / fine < 5.5
    assert dpmpp[-1] < ddim[-1] / 20


@pytest.mark.parametrize("kind", list(Schedule))
def test_the_sample_itself_is_nearer_than_ddims(kind: Schedule) -> None:
    """The flow of N(0, 1) to N(m, s^2) is x -> m + s x."""
    schedule = make_schedule(DiffusionConfig(schedule=kind))
    start = torch.linspace(-2, 2, 9)[:, None, None, None]
    errors = {}
    for solver in Solver:
        for steps in (50, 100):
            grid = timestep_grid(1000, steps)
            *_, end = sample_path(_gaussian(schedule, 0.0, 0.2), schedule, start, None, grid, solver=solver, clip=False)
            errors[solver, steps] = float((end.x_next - 0.2 * start).abs().max())
    for steps in (50, 100):
        assert errors[Solver.dpmpp, steps] < errors[Solver.ddim, steps] / 2


@pytest.mark.parametrize("prediction", list(Prediction))
def test_grids_of_their_own(prediction: Prediction) -> None:
    """A batch of jittered grids does what each sample does alone: bit for bit."""
    schedule, label = make_schedule(DiffusionConfig(prediction=prediction)), torch.tensor([0, 1, 2])
    grid = timestep_grid(1000, 7, torch.tensor([10, 20, 30]))
    together = list(sample_path(_predict, schedule, _start(), label, grid, solver=Solver.dpmpp))
    for i in range(3):
        one = slice(i, i + 1)
        alone = list(sample_path(_predict, schedule, _start()[one], label[one], grid[i], solver=Solver.dpmpp))
        for a, b in zip(together, alone, strict=True):
            assert int(a.t[i]) == int(b.t[0]) and torch.equal(a.x_next[one], b.x_next)


def test_a_long_step_after_a_short_one_does_not_extrapolate_far() -> None:
    """Of two predictions of x_0 that differ by d, a step may take one and d * STEP_RATIO / 2 more."""
    schedule = make_schedule(DiffusionConfig(prediction=Prediction.v))
    grid = torch.tensor([999, 501, 500, 100, 50])
    given = iter([0.0, 0.0, 0.4, 0.0, 0.0])  # x_0 at each timestep

    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        signal, sigma = schedule.signal[t][:, None, None, None], schedule.sigma[t][:, None, None, None]
        return (signal * x - next(given)) / sigma

    step = _path(predict, schedule, _start(), grid)[2]
    signal, sigma = schedule.signal.double(), schedule.sigma.double()
    ratio = sigma[100] / sigma[500]
    extrapolated = 0.4 * (1 + STEP_RATIO / 2)
    expected = ratio * step.x + (signal[100] - signal[500] * ratio) * extrapolated
    torch.testing.assert_close(step.x_next.double(), expected.double(), rtol=0, atol=1e-5)


def test_guided_paths_are_those_of_the_guided_prediction() -> None:
    schedule, label, grid = make_schedule(DiffusionConfig()), torch.tensor([0, 1, 2]), timestep_grid(1000, 6)

    def guided(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return -1.5 * _predict(x, t, torch.full((3,), 9)) + 2.5 * _predict(x, t, label)

    found = list(
        sample_path(_predict, schedule, _start(), label, grid, solver=Solver.dpmpp, guidance=2.5, null_label=9)
    )
    expected = list(sample_path(guided, schedule, _start(), label, grid, solver=Solver.dpmpp))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.x_next, b.x_next, rtol=0, atol=1e-5)
        assert torch.equal(a.prediction, _predict(a.x, a.t, label))


def test_no_host_synchronisation_and_no_gradients() -> None:
    """On the meta device a read-back of any value raises."""
    meta = torch.device("meta")
    schedule = make_schedule(DiffusionConfig()).to(meta)
    seeds = torch.empty(3, dtype=torch.int64, device=meta)
    path = list(
        sample_path(_predict, schedule, _start().to(meta), seeds, timestep_grid(1000, 4, seeds), solver=Solver.dpmpp)
    )
    assert len(path) == 4 and path[-1].x_next.shape == (3, 2, 4, 4)
    weight = torch.ones((), requires_grad=True)
    schedule = make_schedule(DiffusionConfig())
    for step in _path(lambda x, t, label: weight * x, schedule, _start(), timestep_grid(1000, 3)):
        assert torch.is_grad_enabled() and not step.x_next.requires_grad
