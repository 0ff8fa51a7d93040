"""What the model predicts, and what its prediction says of x_0 and the noise."""

from __future__ import annotations

from torch import Tensor

from trainer.config import Prediction
from trainer.diffusion.schedules import NoiseSchedule


def target(schedule: NoiseSchedule, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The regression target at x_t = signal x_0 + sigma eps: eps (Ho et al. 2020) or v (Salimans and Ho 2022).

    Shapes: x0 and noise (B, C, H, W), t int64 (B,); the result as x0.
    """
    if schedule.prediction is Prediction.epsilon:
        return noise
    return at(schedule.signal, t) * noise - at(schedule.sigma, t) * x0


def x0_and_noise(schedule: NoiseSchedule, x_t: Tensor, prediction: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The x_0 and eps that a prediction at x_t stands for, both (B, C, H, W).

    For eps: x_0 = (x_t - sigma eps) / signal. For v (Salimans and Ho 2022, appendix D): x_0 = signal x_t - sigma v
    and eps = sigma x_t + signal v.
    """
    signal, sigma = at(schedule.signal, t), at(schedule.sigma, t)
    if schedule.prediction is Prediction.epsilon:
        return (x_t - sigma * prediction) / signal, prediction
    return signal * x_t - sigma * prediction, sigma * x_t + signal * prediction


def at(table: Tensor, t: Tensor) -> Tensor:
    """Values of a (T,) table at t (B,), shaped (B, 1, 1, 1) to go with images."""
    return table[t][:, None, None, None]
