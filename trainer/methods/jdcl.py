"""JDCL: joint diffusion models in continual learning (Skiers and Deja; ICCV 2025; arXiv 2411.08224)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from trainer.data.batch import Examples, JointExamples
from trainer.kernels.loss import weighted_squared_error
from trainer.methods.base import Predict, Rehearsal, Terms, Weights
from trainer.methods.classifying import Classifying, predict_both, real_loss


@dataclass(frozen=True)
class Jdcl:
    """Two stages a task. The local one learns the task's images (`real_loss`). The global one sets out from the model
    of the tasks before and learns z from its teachers, that model (old classes) and the local one (new classes):

        L = a MSE(eps, e(z_t, t)) + b CE(y, phi(z)) + 2 MSE(e*(z_t, t), e(z_t, t)) + 2 c CE(softmax phi*(z), phi(z))

    e* and phi* are those of the teacher that made z, y the class that it saw in it. In the paper the last two terms are
    sums over the teachers, each with its share of the batch: together the mean over all of it. The classifier learns
    only after a warm-up (`Weights.classifying`). Where nothing is distilled, z is learnt like real images. Real images
    that go on are learnt beside, by `Weights.share`.
    """

    classifying: Classifying
    noise_weight: float  # a
    label_weight: float  # b
    logit_weight: float  # c
    distil: bool = True
    rehearsal = Rehearsal.teacher
    all_tasks = False

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        """In the global stage `current` are the teachers' images, with logits, and `replay` the real ones, if any."""
        if not isinstance(current, JointExamples) or current.logits is None:
            return real_loss(predict, current, weights, self.classifying)
        terms = self._taught(predict, current, weights)
        if replay is None:
            return terms
        real = real_loss(predict, replay, weights, self.classifying)
        loss = terms["loss"] + weights.share * real.pop("loss")
        return terms | {"loss": loss} | {f"real_{name}": value for name, value in real.items()}

    def _taught(self, predict: Predict, z: JointExamples, weights: Weights) -> Terms:
        assert z.noise is not None and z.logits is not None
        prediction, logits = predict_both(predict, z, z.view)
        labels = cross_entropy(logits, z.label)
        if not self.distil:
            loss, means = weighted_squared_error(prediction, [z.noise], weights.of((z, 1.0)))
            loss = loss + weights.classifying * self.classifying.weight * labels
            return {"loss": loss, "noise": means[0], "classification": labels}
        taught, means = weighted_squared_error(prediction, [z.target], weights.of((z, 2.0)))
        squares = (prediction.float() - z.noise.float()).square().flatten(1).mean(dim=1)
        weighted = squares if weights.by_timestep is None else squares * weights.by_timestep[z.t]
        soft = cross_entropy(logits, torch.softmax(z.logits.float(), dim=1))
        classified = self.label_weight * labels + 2.0 * self.logit_weight * soft
        return {
            "loss": self.noise_weight * weighted.mean() + taught + weights.classifying * classified,
            "replay": means[0],
            "noise": squares.mean(),
            "classification": labels,
            "logits": soft,
        }
