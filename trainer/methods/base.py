"""What a continual-learning method is: tensors in, a loss out. It knows nothing of DeepSpeed, ranks or files."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from trainer.data.batch import Examples
from trainer.kernels.loss import weighted_squared_error

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_BCHW, t_B, label_B) -> prediction_BCHW
Terms = dict[str, Tensor]  # scalars on the device; "loss" is the one to minimise


class Rehearsal(Enum):
    """What a method is fed beside the current task's images."""

    none = "none"
    buffer = "buffer"  # real images of earlier tasks
    noise = "noise"  # images of the teacher, the target is the noise added to them
    teacher = "teacher"  # images of the teacher, the target is its own prediction


class Method(Protocol):
    """How a task is learnt without forgetting."""

    rehearsal: Rehearsal
    all_tasks: bool  # learns from the real images of every task so far

    def loss(self, predict: Predict, current: Examples, replay: Examples | None, task: int) -> Terms:
        """Terms of one (micro-)batch of task `task`, counted from 1; `replay` is None where there is none."""
        ...


def current_loss(predict: Predict, current: Examples, weight: float = 1.0) -> Terms:
    """`weight` times the denoising loss (Ho et al. 2020, L_simple) on real images alone."""
    prediction = predict(current.x, current.t, current.label)
    loss, means = weighted_squared_error(prediction, [current.target], [weight])
    return {"loss": loss, "current": means[0]}


def mixed_loss(predict: Predict, current: Examples, replay: Examples, weights: tuple[float, float]) -> Terms:
    """`weights[0] * current + weights[1] * replay` from one forward pass over both, so ZeRO gathers once."""
    prediction = predict(
        torch.cat([current.x, replay.x]),
        torch.cat([current.t, replay.t]),
        torch.cat([current.label, replay.label]),
    )
    loss, means = weighted_squared_error(prediction, [current.target, replay.target], weights)
    return {"loss": loss, "current": means[0], "replay": means[1]}


def share_weighted_loss(
    predict: Predict, current: Examples, replay: Examples | None, task: int, distillation_weight: float
) -> Terms:
    """`(1/k) current + (1 - 1/k) lambda replay`: each task weighs the same (van de Ven et al. 2020).

    The first task has nothing to replay. A step starved of replay keeps the weight 1/k on its real images.
    """
    if task == 1:
        return current_loss(predict, current)
    if replay is None:
        return current_loss(predict, current, 1 / task)
    return mixed_loss(predict, current, replay, (1 / task, (1 - 1 / task) * distillation_weight))
