"""The loss of a model that also classifies, on real images (Skiers and Deja 2025, arXiv 2411.08224, section 3).

    L = MSE(eps, e(x_t, t)) + w CE(y, phi(x'))

x' is a strongly augmented view without noise, phi the classifier on the features of the encoder at t = 0; the mean of
the cross-entropy is over the images whose label is known. Where labels are missing, FixMatch (Sohn et al. 2020,
arXiv 2001.07685, equation 4) adds, as a mean over the images without one,

    w_u [max q >= tau] CE(argmax q, phi(x'))        q = softmax phi(a weakly augmented view), without gradient

Both means divide by how many such images there are to be expected, not by how many a micro-batch happens to have: so
the loss is the same however a batch is cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.data.batch import Examples, JointExamples
from trainer.kernels.loss import weighted_squared_error
from trainer.methods.base import Predict, Terms, Weights, current_loss

Both = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # (x, t, label, view) -> prediction, logits


@dataclass(frozen=True)
class Classifying:
    """What classifying weighs: `weight` w, `fixmatch_weight` w_u, `fixmatch_threshold` tau; `labelled` is the share of
    the images whose label is known."""

    weight: float
    labelled: float = 1.0
    fixmatch_weight: float = 0.0
    fixmatch_threshold: float = 0.95


def predict_both(predict: Predict, examples: JointExamples, view: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions (B, C, H, W) at the examples and logits (N, K) fp32 of the views (N, C, H, W), from one pass."""
    prediction, logits = cast(Both, predict)(examples.x, examples.t, examples.label, view)
    return prediction, logits.float()


def real_loss(predict: Predict, current: Examples, weights: Weights, classifying: Classifying | None) -> Terms:
    """The denoising loss, with the classifier's where the examples have views."""
    if not isinstance(current, JointExamples):
        return current_loss(predict, current, weights)
    assert classifying is not None, "a model with a classifier"
    view = current.view if current.weak is None else torch.cat([current.view, current.weak])
    prediction, logits = predict_both(predict, current, view)
    loss, means = weighted_squared_error(prediction, [current.target], weights.of((current, 1.0)))
    strong, known = logits[: len(current)], current.known.float()
    told = _mean(cross_entropy(strong, current.label, reduction="none"), known, classifying.labelled)
    terms = {"loss": loss + classifying.weight * told, "current": means[0], "classification": told}
    if current.weak is None:
        return terms
    sure, guess = logits[len(current) :].detach().softmax(dim=1).max(dim=1)
    taken = (sure >= classifying.fixmatch_threshold).float() * (1.0 - known)
    unlabelled = 1.0 - classifying.labelled
    guessed = _mean(cross_entropy(strong, guess, reduction="none"), taken, unlabelled)
    loss = terms["loss"] + classifying.fixmatch_weight * guessed
    return terms | {"loss": loss, "fixmatch": guessed, "fixmatch_taken": _mean(taken, taken, unlabelled)}


def _mean(values: Tensor, chosen: Tensor, share: float) -> Tensor:
    """Sum of the chosen values, (B,) each, over the number of values that are of a kind of which there is `share`."""
    return (values * chosen).mean() / share
