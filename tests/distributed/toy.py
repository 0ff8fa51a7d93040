"""A tiny denoiser and its batches, for the engine and for the plain torch loop that it is compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

GLOBAL_BATCH = 8
CLASSES = 3
PENALTY_WEIGHT = 0.7


class ToyDenoiser(nn.Module):
    """(x (B,1,3,3), t (B,), label (B,)) -> (B,1,3,3). Odd sizes: no parameter count divides by two, nor their sum."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, padding=1)
        self.time = nn.Linear(1, 5)
        self.classes = nn.Embedding(CLASSES, 5)
        self.norm = nn.GroupNorm(1, 5)
        self.out = nn.Conv2d(5, 1, 3, padding=1)
        self.register_buffer("scale", torch.tensor([0.01]))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        assert isinstance(self.scale, Tensor)
        shift = self.time((t[:, None] * self.scale).to(x.dtype))
        if label is not None:
            shift = shift + self.classes(label)
        hidden = self.norm(self.conv(x) + shift[:, :, None, None])
        return self.out(nn.functional.silu(hidden))

    def blocks(self) -> list[nn.Module]:
        """Two units of their own; the rest is a third."""
        return [self.conv, self.norm]


def make_model(seed: int = 0) -> ToyDenoiser:
    torch.manual_seed(seed)
    return ToyDenoiser()


def batch(step: int, rank: int = 0, size: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """This rank's share of a step's (x, t, label, target), a function of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(GLOBAL_BATCH, 1, 3, 3, generator=generator)
    target = 3 * torch.randn(GLOBAL_BATCH, 1, 3, 3, generator=generator)
    t = torch.randint(0, 100, (GLOBAL_BATCH,), generator=generator)
    label = torch.randint(0, CLASSES, (GLOBAL_BATCH,), generator=generator)
    share = slice(rank * GLOBAL_BATCH // size, (rank + 1) * GLOBAL_BATCH // size)
    return x[share], t[share], label[share], target[share]


def learning_rate(step: int) -> float:
    """A warm-up, so that set_lr matters."""
    return 1e-2 * min(1.0, (step + 1) / 3)


def memory(task: int) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Weights, and what a Fisher information might be, by parameter name; c. As a penalty remembers a task."""
    generator = torch.Generator().manual_seed(2000 + task)
    shapes = {name: weight.shape for name, weight in make_model().named_parameters()}
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    fisher = {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}
    return weights, fisher, 0.05 * (task + 1)
