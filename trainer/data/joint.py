"""From a host batch to what a model that also classifies learns from: noisy weak views, strong ones without noise."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from trainer.data.augment import Augmentation, Seeds, strong_views, weak_views
from trainer.data.batch import JointExamples
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.kernels.noise import normalise
from trainer.seeds import derive


class JointPreparer:
    """Prepares crops as `Preparer` does images, and draws the views for the classifier apart from them."""

    def __init__(self, prepare: Preparer, augmentation: Augmentation, guesses: bool) -> None:
        """Args:
        prepare: of the pairs; the views are mirrored if it mirrors.
        guesses: whether the classifier is also to be asked about weak views (FixMatch).
        """
        assert prepare.flip == augmentation.flip, "one setting of the data"
        self.prepare, self.augmentation, self.guesses = prepare, augmentation, guesses

    def __call__(self, batch: HostBatch) -> JointExamples:
        """As many examples as the batch has images; a negative label is an unknown one."""
        images = batch.images.to(self.prepare.device, non_blocking=True)
        # The pairs are mirrored together with what else is done to them, by the same draws as without crops.
        crops = weak_views(images, self._seeds(batch, "crop"), replace(self.augmentation, flip=False))
        pairs = self.prepare(replace(batch, images=crops))
        strong = strong_views(images, self._seeds(batch, "strong"), self.augmentation)
        weak = weak_views(images, self._seeds(batch, "weak"), self.augmentation) if self.guesses else None
        return JointExamples(
            pairs.x,
            pairs.t,
            pairs.target,
            pairs.label.clamp(min=0),
            view=self._normalised(strong),
            known=pairs.label >= 0,
            weak=None if weak is None else self._normalised(weak),
        )

    def _normalised(self, views: Tensor) -> Tensor:
        return normalise(views).to(self.prepare.dtype)

    def _seeds(self, batch: HostBatch, use: str) -> Seeds:
        return derive(self.prepare.seed, f"{self.prepare.purpose}/{use}", batch.keys, batch.draws)
