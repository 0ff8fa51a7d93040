"""Means of scalars that stay on the device until they are asked for: no synchronisation inside a step."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.world import World


class Meter:
    """Running sums of named scalars; every rank must add the same names in the same order.

    What is not finite (of a step that was skipped) is left out of the means.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # (2,): sum and count

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar tensor."""
        value = value.detach().float()
        finite = value.isfinite()
        part = torch.stack([torch.where(finite, value, 0.0), finite.float()])
        self._sums[name] = self._sums[name] + part if name in self._sums else part

    def fetch(self, world: World) -> dict[str, float]:
        """Means over steps and ranks since the last fetch, then start again. One collective, one copy to the host.

        NaN where no value was finite.
        """
        if not self._sums:
            return {}
        names = list(self._sums)
        sums = torch.stack(list(self._sums.values()))
        total, count = world.all_gather(sums[None]).sum(dim=0).unbind(dim=1)
        self._sums = {}
        return dict(zip(names, (total / count).tolist(), strict=True))
