"""From a host batch to what a model that also classifies learns from: noisy weak views, strong ones without noise."""

from __future__ import annotations

from dataclasses import replace

from trainer.data.augment import Augmentation, Seeds, strong_views, weak_views
from trainer.data.batch import JointExamples
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.kernels.noise import normalise
from trainer.seeds import derive


class JointPreparer:
    """Prepares weak views as `Preparer` does images, and draws the views for the classifier apart from them."""

    def __init__(self, prepare: Preparer, augmentation: Augmentation, guesses: bool) -> None:
        """Args:
        prepare: of the pairs; it flips no image itself.
        guesses: whether the classifier is also to be asked about weak views (FixMatch).
        """
        assert not prepare.flip, "the views are flipped already"
        self.prepare, self.augmentation, self.guesses = prepare, augmentation, guesses

    def __call__(self, batch: HostBatch) -> JointExamples:
        """As many examples as the batch has images; a negative label is an unknown one."""
        prepare = self.prepare
        images = batch.images.to(prepare.device, non_blocking=True)
        shown = replace(batch, images=weak_views(images, self._seeds(batch, "view"), self.augmentation))
        pairs = prepare(shown)
        view = strong_views(images, self._seeds(batch, "strong"), self.augmentation)
        weak = weak_views(images, self._seeds(batch, "weak"), self.augmentation) if self.guesses else None
        return JointExamples(
            pairs.x,
            pairs.t,
            pairs.target,
            pairs.label.clamp(min=0),
            normalise(view).to(prepare.dtype),
            pairs.label >= 0,
            weak=None if weak is None else normalise(weak).to(prepare.dtype),
        )

    def _seeds(self, batch: HostBatch, use: str) -> Seeds:
        return derive(self.prepare.seed, f"{self.prepare.purpose}/{use}", batch.keys, batch.draws)
