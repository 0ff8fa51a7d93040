"""Gaussian distillation: the teacher's answers to pure noise (a baseline in Masip et al. 2024, arXiv 2311.14028)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights, share_weighted_loss


@dataclass(frozen=True)
class GaussianDistillation:
    """L = (1/k) MSE(eps, e(x_s, s)) + (1 - 1/k) lambda MSE(e*(z, s'), e(z, s')), z ~ N(0, I) at every s'.

    e* is the teacher, asked once for each z; nothing is sampled.
    """

    distillation_weight: float
    rehearsal = Rehearsal.teacher
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return share_weighted_loss(predict, current, replay, weights, self.distillation_weight)
