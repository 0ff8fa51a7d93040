"""Learning without forgetting for a denoiser (Li and Hoiem 2016; the LwF-like baseline of Masip et al. 2024)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights, share_weighted_loss


@dataclass(frozen=True)
class Lwf:
    """L = (1/k) MSE(eps, e(x_s, s)) + (1 - 1/k) lambda MSE(e*(x_s, s), e(x_s, s)), x_s the current task's own batch.

    e* is the teacher, asked once for each image. A class-conditional teacher knows nothing of the current classes; it
    is asked, and the student taught, for a class of the earlier tasks (the old heads of LwF).
    """

    distillation_weight: float
    rehearsal = Rehearsal.teacher
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return share_weighted_loss(predict, current, replay, weights, self.distillation_weight)
