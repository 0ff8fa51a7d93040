"""Elastic weight consolidation with a diagonal Fisher (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.methods.penalty import Gradients, Memory, Total, dot


class Ewc:
    """P = (lambda / 2) sum_k sum_i F_k,i (theta_i - theta_k,i)^2, over all tasks k before the present one.

    F_k = E[g^2] elementwise, g the gradient of the denoising loss of one sample: a real image of task k at one timestep
    with one noise. It is the empirical Fisher, the loss in the place of a negative log-likelihood.

    A sum of quadratics is a quadratic: with S = sum_k F_k and the mean A = (sum_k F_k theta_k) / S,
    P = (lambda / 2) (sum_i S_i (theta_i - A_i)^2 + C), C a constant. So two vectors keep any number of tasks, exactly
    (online EWC, Schwarz et al. 2018, forgets earlier anchors and is another method).
    """

    needs_fisher = True

    def __init__(self, weight: float) -> None:
        """`weight` is lambda."""
        self.weight = weight
        self._stiffness: list[Tensor] = []  # S
        self._centre: list[Tensor] = []  # A
        self._constant = torch.zeros((), dtype=torch.float64)  # this part's share of C

    def estimate(
        self, gradients: Gradients, weights: Sequence[Tensor], samples: int, total: Total
    ) -> tuple[list[Tensor], float]:
        """F_k, in one pass."""
        sums = [torch.zeros_like(part) for part in weights]
        for sample in gradients():
            for part, gradient in zip(sums, sample, strict=True):
                part.addcmul_(gradient, gradient)
        return [total(part).div_(samples) for part in sums], 1.0

    def remember(self, memory: Memory) -> None:
        if not self._stiffness:
            self._stiffness = [fisher.clone() for fisher in memory.fisher]
            self._centre = [theta.clone() for theta in memory.weights]
            self._constant = self._constant.to(self._centre[0].device)
            return
        state = zip(self._stiffness, self._centre, memory.fisher, memory.weights, strict=True)
        for stiffness, centre, fisher, theta in state:
            away = theta - centre
            share = fisher / (stiffness + fisher)
            share.nan_to_num_(nan=0.0)  # where nothing holds, the centre does not matter
            self._constant += dot([stiffness * share], [away * away])
            centre.addcmul_(share, away)
            stiffness += fisher

    def grad(self, weights: Sequence[Tensor], total: Total) -> tuple[list[Tensor], Tensor]:
        moved = [theta - centre for theta, centre in zip(weights, self._centre, strict=True)]
        force = [stiffness * part for stiffness, part in zip(self._stiffness, moved, strict=True)]
        value = total(dot(force, moved) + self._constant) * (self.weight / 2)
        return [part.mul_(self.weight) for part in force], value
