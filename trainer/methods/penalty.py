"""What a penalty is: a quadratic that holds the weights near those of earlier tasks. It sees parts of the weights.

A trainer may hold only some stretches of the weights (ZeRO). Every penalty here is a sum over elements, or a sum of
products over elements followed by a function of a few scalars; so each works on any part of the weights, and adds up
scalars over all parts through the function `total` that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]  # numbers of one part -> their sums over all parts, of the same shape
Gradients = Callable[[], Iterable[Sequence[Tensor]]]  # called for each pass: the gradients of one sample after another

CHUNK_NUMEL = 1 << 22  # elements taken to fp64 at once


@dataclass(frozen=True)
class Memory:
    """What is kept of a task that was learnt, laid out like the weights: theta_k, and what its Fisher information left.

    `fisher`: the diagonal (ewc), mu (rank1_ewc), nothing (l2). `scale`: c (rank1_ewc), else 1.
    """

    weights: Sequence[Tensor]
    fisher: Sequence[Tensor] = ()
    scale: float = 1.0


class Penalty(Protocol):
    """A hold on the weights. Built for each task anew, from the memories of all tasks before it."""

    needs_fisher: bool

    def estimate(
        self, gradients: Gradients, weights: Sequence[Tensor], samples: int, total: Total
    ) -> tuple[list[Tensor], float]:
        """`Memory.fisher` and `Memory.scale` of a task from gradients of its loss, one sample at a time.

        Args:
            gradients: of the samples of this share, each laid out like `weights`; the same ones at every call.
            samples: in all shares.
            total: sums over all shares.
        """
        ...

    def remember(self, memory: Memory) -> None:
        """Hold on to one more task; in the order of the tasks."""
        ...

    def grad(self, weights: Sequence[Tensor], total: Total) -> tuple[list[Tensor], Tensor]:
        """The penalty's gradient at these parts of the weights, laid out like them, and its value (scalar, whole)."""
        ...


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The sum of products of all elements, an fp64 scalar, without a copy of the whole in fp64.

    In fp64, because a dot product of weights is much larger than the difference that a penalty is after.
    """
    parts = [torch.zeros((), dtype=torch.float64, device=a[0].device)]
    for x, y in zip(a, b, strict=True):
        left, right = x.reshape(-1), y.reshape(-1)
        for start in range(0, left.numel(), CHUNK_NUMEL):
            piece = slice(start, start + CHUNK_NUMEL)
            parts.append(torch.dot(left[piece].double(), right[piece].double()))
    return torch.stack(parts).sum()
