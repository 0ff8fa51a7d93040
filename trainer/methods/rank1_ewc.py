"""EWC with a Fisher of rank one (Wang, Gupta, Dong, MacLellan; ICLR 2026; arXiv 2509.23593).

A diffusion model's gradients are nearly collinear at low signal-to-noise ratio, so that one direction holds most of the
curvature. One vector and two numbers a task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.methods.penalty import Gradients, Memory, Total, dot


@dataclass(frozen=True)
class _Direction:
    mu: Sequence[Tensor]
    scale: float  # c
    origin: Tensor  # this part's share of mu . theta_k, fp64


class Rank1Ewc:
    """P = (lambda / 2) sum_k c_k (mu_k . (theta - theta_k))^2, over all tasks k before the present one.

    mu_k = E[g] and c_k = E[(mu_k . g)^2] / |mu_k|^4, g the gradient of the denoising loss of one sample (see `Ewc`):
    c_k mu_k mu_k^T is the matrix of this direction that agrees along it with the empirical Fisher E[g g^T].
    """

    needs_fisher = True

    def __init__(self, weight: float) -> None:
        """`weight` is lambda."""
        self.weight = weight
        self._directions: list[_Direction] = []

    def estimate(
        self, gradients: Gradients, weights: Sequence[Tensor], samples: int, total: Total
    ) -> tuple[list[Tensor], float]:
        """mu_k in one pass, c_k in a second."""
        sums = [torch.zeros_like(part) for part in weights]
        for sample in gradients():
            for part, gradient in zip(sums, sample, strict=True):
                part += gradient
        mu = [total(part).div_(samples) for part in sums]
        length = dot(mu, mu)  # every share has the whole of mu
        along = torch.zeros_like(length)
        for sample in gradients():
            along += dot(mu, sample).square()
        scale = (total(along) / samples / length.square()).item()
        return mu, scale if length > 0 else 0.0

    def remember(self, memory: Memory) -> None:
        self._directions.append(_Direction(memory.fisher, memory.scale, dot(memory.fisher, memory.weights)))

    def grad(self, weights: Sequence[Tensor], total: Total) -> tuple[list[Tensor], Tensor]:
        distance = total(torch.stack([dot(known.mu, weights) - known.origin for known in self._directions]))
        scale = distance.new_tensor([known.scale for known in self._directions])
        value = (scale * distance.square()).sum() * (self.weight / 2)
        force = (scale * distance * self.weight).to(weights[0].dtype)
        gradients = [torch.zeros_like(part) for part in weights]
        for strength, known in zip(force, self._directions, strict=True):
            for part, mu in zip(gradients, known.mu, strict=True):
                part.addcmul_(mu, strength)
        return gradients, value
