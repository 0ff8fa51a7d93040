"""What the tests of the samplers have in common: a stand-in for a network, a start, diffusers' names."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import Prediction, Schedule

NAMES = {Schedule.linear: "linear", Schedule.cosine: "squaredcos_cap_v2"}
PREDICTIONS = {Prediction.epsilon: "epsilon", Prediction.v: "v_prediction"}


def stand_in(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """A smooth stand-in for a network that looks at everything it is given."""
    shift = torch.cos(t / 200.0) + (0.0 if label is None else 0.1 * label)
    return 0.9 * torch.sin(x + 0.3 * shift[:, None, None, None])


def start(batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, 4, 4, generator=torch.Generator().manual_seed(1))
