"""Noise schedules of the discrete forward process q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import DiffusionConfig, Prediction, Schedule
from trainer.errors import ConfigError

COSINE_OFFSET = 0.008
MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables over the timesteps 0 ... T - 1, each fp32 (T,): signal = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)."""

    signal: Tensor
    sigma: Tensor
    prediction: Prediction

    @property
    def timesteps(self) -> int:
        """T."""
        return self.signal.shape[0]

    @property
    def alpha_bar(self) -> Tensor:
        """(T,) fp32."""
        return self.signal.square()

    def to(self, device: torch.device | str) -> NoiseSchedule:
        return NoiseSchedule(self.signal.to(device), self.sigma.to(device), self.prediction)


def make_schedule(config: DiffusionConfig) -> NoiseSchedule:
    """Tables of a config, computed in float64 and rounded once.

    Raises:
        ConfigError: no timesteps, or betas outside (0, 1), naming the key.
    """
    alpha_bar = torch.cumprod(1.0 - betas(config), dim=0)
    signal, sigma = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    return NoiseSchedule(signal.to(torch.float32), sigma.to(torch.float32), config.prediction)


def betas(config: DiffusionConfig) -> Tensor:
    """beta_t of q(x_t | x_{t-1}), float64 (T,). Raises ConfigError as `make_schedule` does."""
    if config.timesteps < 2:
        raise ConfigError(f"diffusion.timesteps: {config.timesteps}, must be at least 2")
    if config.schedule is Schedule.cosine:
        return _cosine_betas(config.timesteps)
    for key, value in (("beta_start", config.beta_start), ("beta_end", config.beta_end)):
        if not 0.0 < value < 1.0:
            raise ConfigError(f"diffusion.{key}: {value}, must lie between 0 and 1")
    return torch.linspace(config.beta_start, config.beta_end, config.timesteps, dtype=torch.float64)


def _cosine_betas(timesteps: int) -> Tensor:
    """Nichol and Dhariwal 2021, eq. 17, with s = 0.008 and betas clipped at 0.999."""
    steps = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    alpha_bar = torch.cos((steps + COSINE_OFFSET) / (1.0 + COSINE_OFFSET) * (math.pi / 2)).square()
    return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp_(max=MAX_BETA)
