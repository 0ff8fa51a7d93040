"""What a model that also classifies is fed: the denoiser's pairs as without it, views apart from them, known labels."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch

from trainer.config import DiffusionConfig
from trainer.data.augment import Augmentation, weak_views
from trainer.data.batch import Examples, JointExamples
from trainer.data.joint import JointPreparer
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.diffusion.schedules import make_schedule
from trainer.kernels.noise import normalise
from trainer.seeds import derive

COUNT = 48
WHOLE = Augmentation(flip=True, crop=1.0, operations=2, magnitude=10)
CROPPED = Augmentation(flip=True, crop=0.6, operations=2, magnitude=10)


def batch_of(rows: slice = slice(None), draw: int = 3) -> HostBatch:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (COUNT, 3, 16, 16), dtype=np.uint8))
    labels = torch.arange(COUNT) % 5 - 1
    keys = np.arange(COUNT, dtype=np.uint64) * np.uint64(977)
    return HostBatch(images[rows], labels[rows], keys[rows], np.full(COUNT, draw, dtype=np.uint64)[rows])


def preparer(flip: bool = True, dtype: torch.dtype = torch.float32, purpose: str = "current") -> Preparer:
    schedule = make_schedule(DiffusionConfig())
    return Preparer(schedule, seed=5, purpose=purpose, flip=flip, device=torch.device("cpu"), dtype=dtype)


def same(one: Examples, other: Examples) -> bool:
    pairs = [(getattr(one, part.name), getattr(other, part.name)) for part in fields(one)]
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("purpose", ["current", "current/2"])
@pytest.mark.parametrize("flip", [True, False])
def test_pairs_of_whole_images_are_those_of_a_model_without_classifier(flip: bool, purpose: str) -> None:
    views = Augmentation(flip, 1.0, 2, 10)
    found = JointPreparer(preparer(flip, purpose=purpose), views, guesses=True)(batch_of())
    plain = preparer(flip, purpose=purpose)(batch_of())
    assert all(torch.equal(getattr(found, name), getattr(plain, name)) for name in ("x", "t", "target"))


def test_pairs_are_of_crops_with_the_same_noise_and_timesteps() -> None:
    batch = batch_of()
    found, plain = JointPreparer(preparer(), CROPPED, guesses=False)(batch), preparer()(batch)
    assert torch.equal(found.t, plain.t) and torch.equal(found.target, plain.target)
    seeds = derive(5, "current/crop", batch.keys, batch.draws)
    crops = weak_views(batch.images, seeds, Augmentation(False, 0.6, 0, 0))
    again = preparer()(HostBatch(crops, batch.labels, batch.keys, batch.draws))
    assert torch.equal(found.x, again.x) and not torch.equal(found.x, plain.x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_views_are_clean_images_in_the_models_precision(dtype: torch.dtype) -> None:
    found = JointPreparer(preparer(dtype=dtype), CROPPED, guesses=True)(batch_of())
    assert found.weak is not None and found.noise is None and found.logits is None
    levels = normalise(torch.arange(256, dtype=torch.uint8)).to(dtype)
    for view in (found.view, found.weak):
        assert view.dtype == dtype and view.shape == found.x.shape
        assert bool(torch.isin(view.float(), levels.float()).all())


def test_views_are_drawn_apart() -> None:
    """With mirroring alone, a view is the image or its mirror: which, is independent between the views."""
    batch = batch_of()
    found = JointPreparer(preparer(), Augmentation(True, 1.0, 0, 10), guesses=True)(batch)
    assert found.weak is not None
    schedule = make_schedule(DiffusionConfig())
    signal, sigma = (part[found.t].view(-1, 1, 1, 1) for part in (schedule.signal, schedule.sigma))
    readable = found.t < 900
    views = (found.x - sigma * found.target) / signal, found.view, found.weak
    image = normalise(batch.images)
    unmoved = [(view - image).abs().mean(dim=(1, 2, 3)) < 0.1 for view in views]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        agree = (unmoved[one] == unmoved[other])[readable].float().mean()
        assert 0.2 < float(agree) < 0.8


def test_guesses_only_where_asked_for() -> None:
    assert JointPreparer(preparer(), CROPPED, guesses=False)(batch_of()).weak is None


def test_an_unknown_label_is_an_index_that_is_not_to_be_used() -> None:
    batch = batch_of()
    found = JointPreparer(preparer(), WHOLE, guesses=False)(batch)
    assert found.known.dtype == torch.bool and torch.equal(found.known, batch.labels >= 0)
    assert 0 < int(found.known.sum()) < COUNT
    assert torch.equal(found.label[found.known], batch.labels[found.known]) and int(found.label.min()) == 0


def test_examples_do_not_depend_on_the_batch_and_rows_cut_all_of_them() -> None:
    prepare = JointPreparer(preparer(), CROPPED, guesses=True)
    whole = prepare(batch_of())
    for rows in (slice(0, 16), slice(16, 48), slice(7, 8)):
        part = whole.rows(rows)
        assert isinstance(part, JointExamples) and len(part) == rows.stop - rows.start
        assert same(prepare(batch_of(rows)), part)
    other = prepare(batch_of(draw=4))
    assert not torch.equal(other.view, whole.view) and not torch.equal(other.x, whole.x)


def test_rows_keep_what_a_teacher_adds() -> None:
    count = torch.arange(6)
    image = torch.rand(6, 1, 2, 2)
    examples = JointExamples(image, count, image + 1, count, image + 2, count > 2, None, image + 3, torch.rand(6, 10))
    part = examples.rows(slice(2, 5))
    for field in fields(examples):
        value = getattr(examples, field.name)
        assert (
            getattr(part, field.name) is None if value is None else torch.equal(getattr(part, field.name), value[2:5])
        )
