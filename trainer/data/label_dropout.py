"""Labels replaced by one that stands for no class, so that a model also learns to predict without them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from trainer.config import Config
from trainer.data.batch import Examples
from trainer.kernels.philox import uniform
from trainer.seeds import UInt64, derive


@dataclass(frozen=True)
class LabelDropout:
    """Replaces a share of labels by `null_label` (Ho and Salimans 2022, arXiv 2207.12598, algorithm 1).

    Which ones is a function of the run's seed, the purpose, the sample's key and its draw.
    """

    share: float
    null_label: int
    seed: int

    @staticmethod
    def of(config: Config) -> LabelDropout | None:
        """None where no label is dropped."""
        if config.null_label is None:
            return None
        return LabelDropout(config.model.label_dropout, config.null_label, config.run.seed)

    def __call__(self, label: Tensor, purpose: str, keys: UInt64, draws: UInt64 | int = 0) -> Tensor:
        """label int64 (B,) on any device, keys (B,) -> labels (B,)."""
        seeds = torch.from_numpy(derive(self.seed, purpose, keys, draws)).to(label.device, non_blocking=True)
        return torch.where(uniform(seeds, 1)[:, 0] < self.share, self.null_label, label)

    def of_positions(self, replay: Examples, task: int, first: int) -> Examples:
        """Replay points at the positions `first`, `first` + 1, ... of the training sequence of a task.

        Their targets stay as they are. A teacher's predictions for the classes that its points were sampled with are,
        averaged over the classes that lead to one x_t, its prediction without class (of unguided paths; guided ones
        weigh the classes by their own points).
        """
        keys = np.arange(first, first + len(replay), dtype=np.uint64)
        return replace(replay, label=self(replay.label, f"replay-label-dropout/{task}", keys))
