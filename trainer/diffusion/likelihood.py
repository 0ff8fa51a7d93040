"""The variational bound on the likelihood of images, term by term (Ho et al. 2020, arXiv 2006.11239, equation 5).

    -log p(x_0) <= L_T + sum_{t=1}^{T-1} L_t + L_0
    L_T = KL(q(x_T | x_0) || N(0, I))                    the prior term
    L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))  one step of the way back
    L_0 = -log p(x_0 | x_1)                              the decoder, discretised to the 256 values of a pixel

(timestep t of this project is their t + 1.) p has the fixed small variance beta~_t, that of the posterior q; the
decoder, whose posterior has none, takes the next one's, as Ho et al. do. All terms are in nats, summed over the pixels
of an image, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.schedules import betas

HALF_PIXEL = 1.0 / 255.0  # half the distance of neighbouring values in [-1, 1]


@dataclass(frozen=True)
class Posterior:
    """q(x_{t-1} | x_t, x_0) = N(x0_weight x_0 + ..., variance I), float64 (T,) each (Ho et al. 2020, eq. 7).

    `variance` is beta~_t; at t = 0, where it is zero, beta~_1 stands in its place. `alpha_bar_end` is alpha_bar of the
    last timestep.
    """

    x0_weight: Tensor
    variance: Tensor
    alpha_bar_end: float

    @staticmethod
    def of(config: DiffusionConfig) -> Posterior:
        """The posterior of a config's schedule, on the CPU. Raises ConfigError as `make_schedule` does."""
        beta = betas(config)
        alpha_bar = torch.cumprod(1.0 - beta, dim=0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        x0_weight = before.sqrt() * beta / (1.0 - alpha_bar)  # 1 at t = 0, where beta is 1 - alpha_bar
        variance = beta * (1.0 - before) / (1.0 - alpha_bar)
        variance[0] = variance[1]
        return Posterior(x0_weight, variance, float(alpha_bar[-1]))

    def to(self, device: torch.device | str) -> Posterior:
        return Posterior(self.x0_weight.to(device), self.variance.to(device), self.alpha_bar_end)


def prior_term(x0: Tensor, posterior: Posterior) -> Tensor:
    """L_T of images (B, C, H, W) in [-1, 1]: (B,)."""
    variance = 1.0 - posterior.alpha_bar_end
    constant = variance - 1.0 - torch.log(torch.tensor(variance, dtype=torch.float64)).item()
    return _sum(0.5 * (posterior.alpha_bar_end * x0.double().square() + constant))


def step_term(x0: Tensor, x0_predicted: Tensor, t: Tensor, posterior: Posterior) -> Tensor:
    """L_t for t of 1 ... T - 1: (B,).

    Both Gaussians have the variance beta~_t, and their means differ by the weight of x_0 times the error of its
    prediction, so KL = |x0_weight (x_0 - x0_predicted)|^2 / (2 beta~_t).

    Args:
        x0, x0_predicted: (B, C, H, W).
        t: int64 (B,).
    """
    weight = posterior.x0_weight[t].square() / (2.0 * posterior.variance[t])
    return weight * _sum((x0.double() - x0_predicted.double()).square())


def decoder_term(x0: Tensor, x0_predicted: Tensor, posterior: Posterior) -> Tensor:
    """L_0 (Ho et al. 2020, eq. 13), given the x_0 predicted at t = 0, which is the mean of the decoder there: (B,).

    The probability that N(x0_predicted, beta~_1) gives to the interval of half a value to either side of x_0; the
    outermost intervals go on to infinity. Computed by logarithms throughout: a pixel that is far off costs what it
    costs, and no constant bounds it.
    """
    x = x0.double()
    scale = posterior.variance[0].sqrt()
    # Mirrored to where x lies below the mean: there both distribution functions are small, and their difference exact.
    side = torch.where(x > x0_predicted.double(), -1.0, 1.0)
    centre = side * (x - x0_predicted.double())
    log_upper = _log_normal_cdf((centre + HALF_PIXEL) / scale)
    log_lower = _log_normal_cdf((centre - HALF_PIXEL) / scale)
    inside = log_upper + torch.log1p(-torch.exp(log_lower - log_upper))
    lowest, highest = x < -1.0 + HALF_PIXEL, x > 1.0 - HALF_PIXEL
    # The outermost interval holds all beyond it: on the mirrored line that is below for one side, above for the other.
    below = torch.where(side > 0, lowest, highest)
    above = torch.where(side > 0, highest, lowest)
    beyond = _log_normal_cdf(-(centre - HALF_PIXEL) / scale)
    return -_sum(torch.where(below, log_upper, torch.where(above, beyond, inside)))


def timestep_strata(timesteps: int, count: int) -> Tensor:
    """Edges of at most `count` strata of the timesteps 1 ... T - 1, narrower towards 1: int64 (count + 1,).

    Stratum k holds the timesteps edges[k] ... edges[k + 1] - 1. The terms L_t fall steeply with t, so that equal strata
    would leave most of the scatter to the first; the edges grow with the square of k, and by one at least. With
    T - 1 strata or more every timestep is one.
    """
    last = timesteps - 1
    count = min(count, last)
    k = torch.arange(count + 1, dtype=torch.float64)
    return torch.maximum((last * (k / count).square()).round(), k).to(torch.int64) + 1


def _log_normal_cdf(x: Tensor) -> Tensor:
    return torch.special.log_ndtr(x)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]


def _sum(per_pixel: Tensor) -> Tensor:
    return per_pixel.flatten(1).sum(dim=1)
