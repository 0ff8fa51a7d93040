"""What a training step is fed: tensors only, already on the device."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Training pairs of the denoiser, from real images, a buffer or replay points alike.

    Shapes: x_BCHW and target_BCHW in the model's precision, t_B int64, label_B int64.
    """

    x: Tensor
    t: Tensor
    target: Tensor
    label: Tensor

    def __len__(self) -> int:
        return self.x.shape[0]

    def rows(self, rows: slice) -> Examples:
        """Some of them, as views."""
        return Examples(self.x[rows], self.t[rows], self.target[rows], self.label[rows])
