"""Views of images: torchvision's crops and RandAugment, and nothing that depends on the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, RandAugment, RandomResizedCrop
from torchvision.transforms.v2 import functional as library

from trainer.data.augment import (
    Augmentation,
    crop_boxes,
    drawn_operations,
    randaugment_operations,
    resized_crops,
    strong_views,
    weak_views,
)

CPU = torch.device("cpu")
ALL = Augmentation(flip=True, crop=0.85, operations=2, magnitude=10)
NOTHING = Augmentation(flip=False, crop=1.0, operations=0, magnitude=10)
SHAPES = [(1, 8), (3, 8), (1, 13), (1, 28), (3, 32), (3, 64)]
SPACE = RandAugment._AUGMENTATION_SPACE


def seeds_of(count: int, start: int = 0) -> np.ndarray:
    return np.random.default_rng(start).integers(-(2**63), 2**63 - 1, count, dtype=np.int64)


def images_of(count: int, channels: int, size: int) -> Tensor:
    """Noise of several ranges, a flat image, a grey one and ramps, which have ties and edges."""
    random = np.random.default_rng(size * 10 + channels)
    images = random.integers(0, 256, (count, channels, size, size))
    images[0] = 37
    images[1] = random.integers(0, 256, (1, size, size))
    images[2] = np.linspace(0, 255, size).astype(int)
    images[3] = images[3] // 8 + 100
    return torch.from_numpy(images.astype(np.uint8))


def by_torchvision(image_CHW: Tensor, name: str, magnitude: int, negative: bool) -> Tensor:
    """One image through one operation, by RandAugment's own code."""
    transform: Any = RandAugment(magnitude=magnitude)
    magnitudes, signed = SPACE[name]
    values = magnitudes(31, *image_CHW.shape[1:])
    value = 0.0 if values is None else float(values[magnitude])
    value = -value if signed and negative else value
    nearest = InterpolationMode.NEAREST
    return transform._apply_image_or_video_transform(image_CHW, name, value, nearest, transform._fill)


@pytest.mark.parametrize("magnitude", [0, 10, 17, 30])
@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_each_operation_is_torchvisions(channels: int, size: int, magnitude: int) -> None:
    images = images_of(6, channels, size)
    operations = randaugment_operations(magnitude, size, CPU)
    assert list(operations) == list(SPACE)
    for name, forms in operations.items():
        assert len(forms) == 1 + SPACE[name][1]
        for negative, form in enumerate(forms):
            expected = torch.stack([by_torchvision(image, name, magnitude, bool(negative)) for image in images])
            found = form(images.clone())
            assert found.dtype == torch.uint8 and torch.equal(found, expected), (name, negative)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_a_strong_view_is_torchvisions_operations_one_after_another(channels: int, size: int) -> None:
    images, seeds, names = images_of(60, channels, size), seeds_of(60), list(SPACE)
    augmentation = Augmentation(flip=False, crop=1.0, operations=3, magnitude=12)
    expected = images.clone()
    for number in range(3):
        chosen, negative = drawn_operations(seeds, number, len(names))
        for row in range(60):
            expected[row] = by_torchvision(expected[row], names[chosen[row]], 12, bool(negative[row]))
    assert torch.equal(strong_views(images, seeds, augmentation), expected)
    assert not torch.equal(expected, images)


def test_operations_and_signs_are_drawn_alike_and_apart() -> None:
    seeds = seeds_of(5600)
    first, first_sign = drawn_operations(seeds, 0, 14)
    second, second_sign = drawn_operations(seeds, 1, 14)
    for chosen, sign in ((first, first_sign), (second, second_sign)):
        assert chisquare(np.bincount(chosen, minlength=14)).pvalue > 1e-3  # 400 expected of each
        assert abs(sign.mean() - 0.5) < 4 * 0.5 / 5600**0.5
    for one, other in ((first, second), (first, first_sign), (first_sign, second_sign)):
        table = np.zeros((14, 14))
        np.add.at(table, (one.astype(int), other.astype(int)), 1)
        table = table[table.any(axis=1)][:, table.any(axis=0)]
        assert chi2_contingency(table).pvalue > 1e-3


@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_crops_are_torchvisions_resized_crops(channels: int, size: int) -> None:
    """To half a level of the crops of floating images; of bytes torchvision rounds in between."""
    images, seeds = images_of(40, channels, size), seeds_of(40)
    boxes = crop_boxes(seeds, 0.3, size)
    found = resized_crops(images, boxes)
    assert found.dtype == torch.uint8
    for image, box, view in zip(images, boxes.tolist(), found, strict=True):
        exact = library.resized_crop(image.float(), *box, size=[size, size], antialias=True)
        assert float((view - exact).abs().max()) < 0.5 + 1e-3
        rounded = library.resized_crop(image, *box, size=[size, size], antialias=True)
        assert int((view.int() - rounded.int()).abs().max()) <= 1
    whole = np.tile([0, 0, size, size], (40, 1))
    assert torch.equal(resized_crops(images, whole), images)


@pytest.mark.parametrize(("least", "size"), [(0.85, 8), (0.85, 32), (0.2, 28)])
def test_boxes_are_distributed_as_torchvisions(least: float, size: int) -> None:
    count = 3000
    boxes = crop_boxes(seeds_of(count), least, size)
    crop: Any = RandomResizedCrop(size, scale=(least, 1.0))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [crop.make_params([torch.empty(1, size, size)]) for _ in range(count)]
    reference = np.array([[each[key] for key in ("top", "left", "height", "width")] for each in drawn])
    for found, expected in ((boxes[:, 2:].prod(1), reference[:, 2:].prod(1)), *zip(boxes.T, reference.T, strict=True)):
        edges = np.unique(np.quantile(expected, np.linspace(0, 1, 9)))
        table = np.array([np.histogram(part, [-1, *edges[1:-1], size**2 + 1])[0] for part in (found, expected)])
        assert chi2_contingency(table).pvalue > 1e-3
    assert (boxes[:, :2] >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= size).all()


def test_no_other_crop_than_the_whole_fits_a_share_of_one() -> None:
    assert (crop_boxes(seeds_of(500), 1.0, 8) == [0, 0, 8, 8]).all()


def test_half_of_the_images_are_mirrored_exactly() -> None:
    images = images_of(2000, 1, 8)
    views = weak_views(images, seeds_of(2000), replace(NOTHING, flip=True))
    same, mirrored = (views == images).flatten(1).all(1), (views == images.flip(-1)).flatten(1).all(1)
    assert bool((same | mirrored).all())
    assert abs(float(mirrored.float().mean()) - 0.5) < 4 * 0.5 / 2000**0.5


def test_views_without_anything_are_the_images() -> None:
    images, seeds = images_of(9, 3, 8), seeds_of(9)
    for views in (weak_views(images, seeds, NOTHING), strong_views(images, seeds, NOTHING)):
        assert torch.equal(views, images)
    weak = replace(ALL, operations=0)
    assert torch.equal(strong_views(images, seeds, weak), weak_views(images, seeds, ALL))


@pytest.mark.parametrize(("channels", "size"), SHAPES)
def test_a_view_does_not_depend_on_the_batch(channels: int, size: int) -> None:
    images, seeds = images_of(41, channels, size), seeds_of(41)
    before = images.clone()
    order = np.random.default_rng(0).permutation(41)
    for views in (weak_views, strong_views):
        whole = views(images, seeds, ALL)
        assert whole.dtype == torch.uint8 and whole.shape == images.shape
        single = [views(images[row : row + 1], seeds[row : row + 1], ALL) for row in range(41)]
        assert torch.equal(torch.cat(single), whole)
        assert torch.equal(views(images[order], seeds[order], ALL), whole[order])
        assert not torch.equal(views(images, seeds_of(41, 1), ALL), whole)
    assert torch.equal(images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_the_device() -> None:
    images, seeds = images_of(64, 3, 32), seeds_of(64)
    on_device = images.cuda()
    strong_views(on_device, seeds, ALL)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        views = strong_views(on_device, seeds, ALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    difference = (views.cpu().int() - strong_views(images, seeds, ALL).int()).abs()
    assert float((difference > 1).float().mean()) < 0.05  # where rounding tips an equalised level
