"""What the optimiser remembers of the masters: Adam's moments and step count, the average of the weights, skips."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamMoments:
    """First and second moments of Adam (Kingma & Ba 2015) of each master, read and written in place.

    torch makes them at the first step; here they are made when they are first asked for, as torch would make them.
    """

    def __init__(self, adam: torch.optim.Adam | torch.optim.AdamW, masters: list[Tensor]) -> None:
        self._adam = adam
        self._masters = masters

    def tensors(self, name: str) -> list[Tensor]:
        """The moments called `name`, laid out like the masters."""
        return [state[name] for state in self._states()]

    def steps(self) -> int:
        """Steps taken since the last reset; waits for the device."""
        return int(self._states()[0]["step"].item())

    def set_steps(self, steps: int) -> None:
        for state in self._states():
            state["step"].fill_(steps)

    def reset(self) -> None:
        """The moments of a fresh optimiser."""
        for state in self._states():
            for value in state.values():
                value.zero_()

    def _states(self) -> list[dict[str, Any]]:
        return [self._state(master) for master in self._masters]

    def _state(self, master: Tensor) -> dict[str, Any]:
        state = self._adam.state[master]
        if not state:
            on_device = bool(self._adam.defaults.get("fused") or self._adam.defaults.get("capturable"))
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device if on_device else "cpu")
            for name in MOMENTS:
                state[name] = torch.zeros_like(master, memory_format=torch.preserve_format, requires_grad=False)
        return state


class Ema:
    """Exponential moving average of the masters: average <- decay * average + (1 - decay) * master, at each step."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self._masters = masters
        self._decay = decay
        self.averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def restart(self) -> None:
        """Begin at the masters' present values."""
        for average, master in zip(self.averages, self._masters, strict=True):
            average.copy_(master)

    @torch.no_grad()
    def update(self, skipped: Tensor) -> None:
        """Follow the masters; skipped: fp32 scalar on their device, 1 where the step changed nothing, else 0."""
        weight = (1 - self._decay) * (1 - skipped)
        for average, master in zip(self.averages, self._masters, strict=True):
            average.lerp_(master, weight)


class Skips:
    """Counts steps that changed nothing, in all and in a row, on the device: nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._row = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, skipped: Tensor) -> None:
        """Count one step; skipped: fp32 scalar on the device, 1 or 0."""
        self._total += skipped.long()
        self._row = (self._row + 1) * skipped.long()

    def get(self) -> tuple[int, int]:
        """In all, and in a row up to now; waits for the device."""
        total, row = torch.stack([self._total, self._row]).tolist()
        return total, row

    def set(self, total: int, row: int) -> None:
        self._total.fill_(total)
        self._row.fill_(row)
