"""L2 to the weights of the task before: the plainest hold (as a baseline in Zajac et al. 2023, arXiv 2303.15342)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from trainer.methods.penalty import Gradients, Memory, Total, dot


class L2:
    """P = (lambda / 2) |theta - theta_{k-1}|^2 while task k is learnt."""

    needs_fisher = False

    def __init__(self, weight: float) -> None:
        """`weight` is lambda."""
        self.weight = weight
        self._anchor: Sequence[Tensor] = ()

    def estimate(
        self, gradients: Gradients, weights: Sequence[Tensor], samples: int, total: Total
    ) -> tuple[list[Tensor], float]:
        """Nothing: all weights count the same."""
        return [], 1.0

    def remember(self, memory: Memory) -> None:
        self._anchor = memory.weights

    def grad(self, weights: Sequence[Tensor], total: Total) -> tuple[list[Tensor], Tensor]:
        moved = [theta - anchor for theta, anchor in zip(weights, self._anchor, strict=True)]
        value = total(dot(moved, moved)) * (self.weight / 2)
        return [part.mul_(self.weight) for part in moved], value
