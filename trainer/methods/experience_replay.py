"""Experience replay from a small buffer of real images (Zajac et al. 2023, arXiv 2303.15342)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights, current_loss, mixed_loss


@dataclass(frozen=True)
class ExperienceReplay:
    """L = MSE on task k + c * MSE on the buffer, c the rehearsal coefficient.

    c < 1 ("reduced") keeps a small buffer from being memorised.
    """

    rehearsal_coefficient: float
    rehearsal = Rehearsal.buffer
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        if replay is None:
            return current_loss(predict, current, weights)
        return mixed_loss(predict, current, replay, weights, (1.0, self.rehearsal_coefficient))
