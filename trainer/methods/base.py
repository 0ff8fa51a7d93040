"""What a continual-learning method is: tensors in, a loss out. It knows nothing of DeepSpeed, ranks or files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from trainer.config import Prediction
from trainer.data.batch import Examples
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.loss import weighted_squared_error

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_BCHW, t_B, label_B) -> prediction_BCHW
Terms = dict[str, Tensor]  # scalars on the device; "loss" is the one to minimise


class Rehearsal(Enum):
    """What a method is fed beside the current task's images."""

    none = "none"
    buffer = "buffer"  # real images of earlier tasks
    noise = "noise"  # images of the teacher, the target is the noise added to them
    teacher = "teacher"  # what the teacher is asked about, the target is its prediction


@dataclass(frozen=True)
class Weights:
    """How much each example of a task counts.

    `share`: of the current task, in (0, 1]; 1: nothing was learnt before. `by_timestep`: fp32 (T,), on the device of
    the examples; None: all timesteps count the same. `classifying`: factor of what a classifier within the model learns
    from teachers.
    """

    share: float = 1.0
    by_timestep: Tensor | None = None
    classifying: float = 1.0

    def of(self, *parts: tuple[Examples, float]) -> list[float] | Tensor:
        """What `weighted_squared_error` takes for parts that weigh as much each: per part, or fp32 (B,) per example."""
        if self.by_timestep is None:
            return [weight for _, weight in parts]
        return torch.cat([self.by_timestep[part.t] * weight for part, weight in parts])


def min_snr_weights(schedule: NoiseSchedule, gamma: float) -> Tensor:
    """Min-SNR weights of the timesteps, fp32 (T,): min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v
    (Hang et al. 2023, arXiv 2303.09556, section 3.4)."""
    snr = schedule.signal.double().square() / schedule.sigma.double().square()
    whole = snr + 1.0 if schedule.prediction is Prediction.v else snr
    return (snr.clamp(max=gamma) / whole).to(torch.float32)


class Method(Protocol):
    """How a task is learnt without forgetting."""

    rehearsal: Rehearsal
    all_tasks: bool  # learns from the real images of every task so far

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, weights: Weights) -> Terms:
        """Terms of one (micro-)batch; `replay` is None where there is none."""
        ...


def current_loss(predict: Predict, current: Examples, weights: Weights, factor: float = 1.0) -> Terms:
    """`factor` times the denoising loss (Ho et al. 2020, L_simple) on real images alone."""
    prediction = predict(current.x, current.t, current.label)
    loss, means = weighted_squared_error(prediction, [current.target], weights.of((current, factor)))
    return {"loss": loss, "current": means[0]}


def mixed_loss(
    predict: Predict, current: Examples, replay: Examples, weights: Weights, factors: tuple[float, float]
) -> Terms:
    """`factors[0] * current + factors[1] * replay` from one forward pass over both, so ZeRO gathers once."""
    prediction = predict(
        torch.cat([current.x, replay.x]),
        torch.cat([current.t, replay.t]),
        torch.cat([current.label, replay.label]),
    )
    parts = weights.of((current, factors[0]), (replay, factors[1]))
    loss, means = weighted_squared_error(prediction, [current.target, replay.target], parts)
    return {"loss": loss, "current": means[0], "replay": means[1]}


def share_weighted_loss(
    predict: Predict, current: Examples, replay: Examples | None, weights: Weights, distillation_weight: float
) -> Terms:
    """`s current + (1 - s) lambda replay`, s the share of the current task: with 1/k each task weighs the same (van de
    Ven et al. 2020).

    The first task has nothing to replay. A step starved of replay keeps the weight s on its real images.
    """
    if replay is None or weights.share == 1.0:
        return current_loss(predict, current, weights, weights.share)
    factors = (weights.share, (1.0 - weights.share) * distillation_weight)
    return mixed_loss(predict, current, replay, weights, factors)
