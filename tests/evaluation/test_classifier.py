"""The classifier on real digits: good enough to judge, repeatable, cached, and refused where damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.evaluation.conftest import CPU, TASKS, Digits
from trainer.data.dataset import TaskData
from trainer.errors import UserError
from trainer.evaluation.classifier import (
    CARD_NAME,
    WEIGHTS_NAME,
    Classifier,
    ClassifierSettings,
    classifier_settings,
    load_or_train,
    train_classifier,
)
from trainer.evaluation.networks import ResNet, SmallNet, augment


def short(digits: Digits, seed: int = 0) -> ClassifierSettings:
    return classifier_settings(digits.root, TASKS, epochs=1, seed=seed, flip=False, device=CPU)


def no_data(split: str) -> TaskData:
    raise AssertionError(f"{split} was opened")


def test_digits_are_told_apart(digits: Digits, classifier: Classifier) -> None:
    test = digits.open_split("test")
    images = test.read(np.arange(len(test)))
    assert np.mean(classifier.predict(images) == test.labels) == pytest.approx(classifier.test_accuracy, abs=1e-6)
    assert classifier.test_accuracy > 0.97
    assert classifier.seconds < 60  # 2 seconds on one idle core; a loaded one must not fail the test


def test_probabilities_and_features(digits: Digits, classifier: Classifier) -> None:
    images = digits.open_split("test").read(np.arange(40))
    probabilities, features = classifier.probabilities(images), classifier.features(images)
    assert probabilities.shape == (40, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert features.shape == (40, 64) and features.dtype == np.float32
    np.testing.assert_allclose(classifier.features(images[7:8])[0], features[7], atol=1e-5)


def test_training_depends_on_the_seed_alone_and_leaves_generators_alone(digits: Digits) -> None:
    train = digits.open_split("train")
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first = train_classifier(short(digits), train, CPU).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    second = train_classifier(short(digits), train, CPU).state_dict()
    other = train_classifier(short(digits, seed=1), train, CPU).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_cached_classifier_is_loaded_without_data(digits: Digits, classifier: Classifier) -> None:
    settings = classifier_settings(digits.root, TASKS, epochs=10, seed=0, flip=False, device=CPU)
    again = load_or_train(digits.root / "evaluator", settings, no_data, CPU)
    assert again.id == classifier.id and again.test_accuracy == classifier.test_accuracy
    images = digits.open_split("test").read(np.arange(20))
    np.testing.assert_array_equal(again.features(images), classifier.features(images))
    card = json.loads((digits.root / "evaluator" / settings.id / CARD_NAME).read_text())
    assert card["test_accuracy"] == classifier.test_accuracy and card["train_images"] == len(digits.open_split("train"))


def test_id_follows_everything_that_decides_the_classifier(digits: Digits) -> None:
    base = short(digits)
    changed = [
        replace(base, seed=1),
        replace(base, epochs=2),
        replace(base, flip=True),
        replace(base, shards=base.shards[::-1]),
        replace(base, classes=base.classes[:5]),
        replace(base, architecture="resnet18"),
    ]
    assert len({base.id, *(settings.id for settings in changed)}) == 7
    assert len(base.shards) == 2 and all(len(digest) == 64 for digest in base.shards)


def test_damaged_weights_are_refused(digits: Digits, classifier: Classifier, tmp_path: Path) -> None:
    settings = classifier_settings(digits.root, TASKS, epochs=10, seed=0, flip=False, device=CPU)
    shutil.copytree(digits.root / "evaluator" / settings.id, tmp_path / settings.id)
    path = tmp_path / settings.id / WEIGHTS_NAME
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{WEIGHTS_NAME}.*sha256") as caught:
        load_or_train(tmp_path, settings, no_data, CPU)
    assert "\n" not in str(caught.value)


def test_missing_index_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"task-01/index\.json: missing"):
        classifier_settings(tmp_path, TASKS, epochs=1, seed=0, flip=False, device=CPU)


def test_outputs_follow_class_ids(digits: Digits) -> None:
    """Classes that are not 0..K-1: predictions are class ids, not output numbers."""
    train = digits.open_split("train")
    chosen = train.subset(np.flatnonzero(np.isin(train.labels, (3, 8))))
    settings = replace(short(digits), classes=(3, 8), epochs=3)
    network = train_classifier(settings, chosen, CPU)
    card = {"id": "", "sha256": "", "settings": {"classes": (3, 8)}, "test_accuracy": 0.0, "seconds": 0.0}
    predicted = Classifier(network, card, CPU).predict(chosen.read(np.arange(len(chosen))))
    assert set(predicted) == {3, 8} and np.mean(predicted == chosen.labels) > 0.9


@pytest.mark.parametrize("size", [8, 16, 28, 32, 64, 96])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_network_ends_at_about_four_by_four(size: int, channels: int) -> None:
    network = SmallNet(size, channels, 7)
    x = torch.zeros(2, channels, size, size)
    assert network(x).shape == (2, 7)
    assert 3 <= network.trunk(x).shape[-1] <= 6


def test_resnet_has_the_stem_for_small_images() -> None:
    network = ResNet(32, 3, 10)
    assert isinstance(network.trunk.maxpool, nn.Identity) and network.trunk.conv1.stride == (1, 1)
    assert network.embed(torch.zeros(2, 3, 32, 32)).shape == (2, 512)


def test_augmentation_shifts_and_flips_whole_images() -> None:
    image = np.arange(64, dtype=np.uint8).reshape(1, 1, 8, 8)
    shifted = augment(np.repeat(image, 200, axis=0), np.random.default_rng(0), flip=False)
    padded = np.pad(image[0, 0], 1, mode="edge")
    windows = {padded[i : i + 8, j : j + 8].tobytes() for i in range(3) for j in range(3)}
    assert {np.ascontiguousarray(one[0]).tobytes() for one in shifted} == windows
    flipped = augment(np.repeat(image, 200, axis=0), np.random.default_rng(0), flip=True)
    mirrored = {np.ascontiguousarray(np.frombuffer(w, np.uint8).reshape(8, 8)[:, ::-1]).tobytes() for w in windows}
    assert {np.ascontiguousarray(one[0]).tobytes() for one in flipped} == windows | mirrored
