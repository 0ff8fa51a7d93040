"""What a training step is fed: tensors only, already on the device."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, TypeVar

from torch import Tensor

E = TypeVar("E", bound="Examples")


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

    def rows(self: E, rows: slice) -> E:
        """Some of them, as views."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        cut: dict[str, Any] = {name: None if part is None else part[rows] for name, part in parts.items()}
        return type(self)(**cut)


@dataclass(frozen=True)
class JointExamples(Examples):
    """Pairs of the denoiser, and views of the same images for its classifier.

    Shapes: view_BCHW, clean images in [-1, 1]; known_B bool, whether the label may be used; weak_BCHW, weakly augmented
    views, where the classifier's own guess at them is to be used; noise_BCHW, the noise (or v) in x where the target is
    a teacher's prediction; logits_BK, a teacher's of the views.
    """

    view: Tensor
    known: Tensor
    weak: Tensor | None = None
    noise: Tensor | None = None
    logits: Tensor | None = None
