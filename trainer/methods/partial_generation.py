"""Partial generation: states on the teacher's way to an image (a baseline in Masip et al. 2024, arXiv 2311.14028)."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.data.batch import Examples
from trainer.methods.base import Predict, Rehearsal, Terms, Weights, share_weighted_loss


@dataclass(frozen=True)
class PartialGeneration:
    """L = (1/k) MSE(eps, e(x_s, s)) + (1 - 1/k) lambda MSE(e*(z_s', s'), e(z_s', s')), z_s' on a sampling path.

    e* is the teacher, whose path from x_T is stopped at a drawn s' and not noised again. Its prediction there is the
    one that the path goes on with, so it costs no evaluation of its own: N for a point sampled in the loop, N / P in a
    pool that takes P points of each path. The paper counts N + 1.
    """

    distillation_weight: float
    rehearsal = Rehearsal.teacher
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        return share_weighted_loss(predict, current, replay, weights, self.distillation_weight)
