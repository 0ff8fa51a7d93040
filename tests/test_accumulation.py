"""Gradient accumulation: a step in parts is the whole step, with replay in it and without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from trainer.data.batch import Examples
from trainer.methods import ExperienceReplay, Finetune, GenerativeDistillation, Method, Weights
from trainer.steps import micro_batches


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.classes = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(5, 2)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.conv(x + self.classes(label)[:, :, None, None]) * t[:, None, None, None].cos()


def examples(count: int, seed: int) -> Examples:
    draw = torch.Generator().manual_seed(seed)
    x, target = torch.randn(2, count, 2, 4, 4, generator=draw)
    t, label = (torch.randint(0, 5, (count,), generator=draw) for _ in range(2))
    return Examples(x, t, target, label)


def gradients(method: Method, current: Examples, replay: Examples | None, count: int) -> list[Tensor]:
    """Of the mean of the losses of `count` parts, as the engine accumulates them."""
    net = Net()
    for part, rehearsed in micro_batches(current, replay, count):
        (method.loss(net, part, rehearsed, Weights(1 / 3))["loss"] / count).backward()
    return [weight.grad for weight in net.parameters() if weight.grad is not None]


@pytest.mark.parametrize(
    ("method", "points"),
    [(Finetune(), 0), (GenerativeDistillation(0.7), 12), (GenerativeDistillation(0.7), 0), (ExperienceReplay(1.3), 6)],
)
@pytest.mark.parametrize("count", [2, 3, 6])
def test_parts_are_the_whole(method: Method, points: int, count: int) -> None:
    current, replay = examples(24, 1), examples(points, 2) if points else None
    whole, parts = (gradients(method, current, replay, number) for number in (1, count))
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def test_every_row_is_in_one_part() -> None:
    current, replay = examples(12, 1), examples(8, 2)
    parts = list(micro_batches(current, replay, 4))
    assert [len(part) for part, _ in parts] == [3] * 4
    assert torch.equal(torch.cat([part.x for part, _ in parts]), current.x)
    rehearsed = [part for _, part in parts if part is not None]
    assert torch.equal(torch.cat([part.label for part in rehearsed]), replay.label) and len(rehearsed) == 4
