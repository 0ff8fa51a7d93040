"""Means of scalars that stay on the device until they are asked for: no synchronisation inside a step."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.world import World


class Meter:
    """Running sums of named scalars; every rank must add the same names in the same order."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor."""
        value = value.detach().float()
        self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._counts[name] = self._counts.get(name, 0) + 1

    def fetch(self, world: World) -> dict[str, float]:
        """Means over steps and ranks since the last fetch, then start again. One collective, one copy to the host."""
        if not self._sums:
            return {}
        names = list(self._sums)
        means = torch.stack([self._sums[name] / self._counts[name] for name in names])
        over_ranks = world.all_gather(means.reshape(1, -1)).mean(dim=0).tolist()
        self._sums, self._counts = {}, {}
        return dict(zip(names, over_ranks, strict=True))
