"""Generative replay: images of the previous model beside the real ones (Shin et al. 2017; as in Masip et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights, share_weighted_loss


@dataclass(frozen=True)
class GenerativeReplay:
    """L = (1/k) MSE(eps, e(x_s, s)) + (1 - 1/k) lambda MSE(eps', e(z_s', s')), z sampled by the teacher."""

    distillation_weight: float
    rehearsal = Rehearsal.noise
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return share_weighted_loss(predict, current, replay, weights, self.distillation_weight)
