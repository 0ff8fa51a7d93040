"""Joint (cumulative): learn from the real images of every task so far. The upper reference: nothing is forgotten."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights
from trainer.methods.classifying import Classifying, real_loss


@dataclass(frozen=True)
class Joint:
    """L = MSE(eps, e(x_t, t)) on the images of tasks 1..k, and what a classifier in the model learns from them."""

    classifying: Classifying | None = None
    rehearsal = Rehearsal.none
    all_tasks = True

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return real_loss(predict, current, weights, self.classifying)
