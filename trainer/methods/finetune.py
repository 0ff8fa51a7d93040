"""Finetune: learn the current task alone. The lower reference: what forgetting costs."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights
from trainer.methods.classifying import Classifying, real_loss


@dataclass(frozen=True)
class Finetune:
    """L = MSE(eps, e(x_t, t)) on the images of task k, and what a classifier within the model learns from them."""

    classifying: Classifying | None = None
    rehearsal = Rehearsal.none
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return real_loss(predict, current, weights, self.classifying)
