"""The measures on real digits in place of generated ones: what a perfect and a forgetful model would get."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.evaluation.conftest import CPU, TASKS, Digits
from trainer.config import EvaluationConfig, Extractor
from trainer.errors import UserError
from trainer.evaluation.classifier import Classifier
from trainer.evaluation.evaluate import Evaluator, open_evaluator
from trainer.evaluation.frechet import frechet_distance, statistics
from trainer.evaluation.reference import load_reference


@pytest.fixture(scope="module")
def evaluator(digits: Digits, classifier: Classifier) -> Evaluator:
    opened = open_evaluator(EvaluationConfig(), digits.root, TASKS, digits.open_split, flip=False, device=CPU)
    assert opened.classifier.id == classifier.id  # the session's, from the cache
    return opened


@pytest.fixture(scope="module")
def train(digits: Digits) -> tuple[np.ndarray, np.ndarray]:
    data = digits.open_split("train")
    return data.read(np.arange(len(data))), data.labels


def test_few_test_images_are_joined_by_the_train_images(evaluator: Evaluator) -> None:
    assert evaluator.reference.split == "train+test"
    assert len(evaluator.reference.features) == 1797 == len(evaluator.reference.labels)
    assert evaluator.id == f"{evaluator.classifier.id}/train+test"


def test_real_images_score_well_and_row_is_json(evaluator: Evaluator, train: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = train
    row = evaluator.evaluate(images, labels, after_task=2)
    assert row["fd"] < 0.5 and row["kld"] < 0.01 and row["accuracy"] > 0.98
    assert row["samples"] == len(images) and row["fd_reference"] == "train+test" and row["evaluator"] == evaluator.id
    assert [entry["task"] for entry in row["tasks"]] == [1, 2]
    assert sum(entry["share"] for entry in row["tasks"]) == pytest.approx(1.0)
    assert all(entry["fd"] < 0.5 and entry["accuracy"] > 0.98 for entry in row["tasks"])
    json.dumps(row, allow_nan=False)


def test_distance_is_that_of_the_features(evaluator: Evaluator, train: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = train
    row = evaluator.evaluate(images[:300], labels[:300], after_task=1)
    real = evaluator.reference.features[evaluator.reference.labels < 5]
    expected = frechet_distance(statistics(evaluator.classifier.features(images[:300])), statistics(real))
    assert row["fd"] == pytest.approx(expected, rel=1e-6)
    assert [entry["task"] for entry in row["tasks"]] == [1]


def test_a_model_that_forgot_the_first_task(evaluator: Evaluator, train: tuple[np.ndarray, np.ndarray]) -> None:
    """Asked for every class, it gives images of the second task's classes alone."""
    images, labels = train
    new = images[labels >= 5][:700]
    asked = np.arange(700) % 10
    row = evaluator.evaluate(new, asked, after_task=2)
    good = evaluator.evaluate(images, labels, after_task=2)
    first, second = row["tasks"]
    assert first["samples"] == second["samples"] == 350
    assert first["accuracy"] < 0.02 < second["accuracy"] < 0.4
    assert first["share"] < 0.02 and second["share"] > 0.98
    assert row["kld"] > 1.0 and row["fd"] > 20 * good["fd"]
    assert first["fd"] > 5 * second["fd"]


def test_unconditional_samples_belong_to_the_task_they_look_like(
    evaluator: Evaluator, train: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = train
    chosen = np.concatenate([np.flatnonzero(labels < 5)[:10], np.flatnonzero(labels >= 5)[:200]])
    row = evaluator.evaluate(images[chosen], None, after_task=2)
    first, second = row["tasks"]
    assert row["accuracy"] is None and first["accuracy"] is None
    assert first["fd"] is None and first["samples"] <= 12  # fewer than 16: no distance
    assert second["fd"] is not None and second["share"] == pytest.approx(200 / 210, abs=0.02)


def test_reference_features_are_cached_and_made_again_when_cut(
    digits: Digits, evaluator: Evaluator, classifier: Classifier
) -> None:
    class Counting:
        name, id, calls = "counting", classifier.id, 0

        def features(self, images: np.ndarray) -> np.ndarray:
            self.calls += 1
            return classifier.features(images)

    extractor, cache = Counting(), digits.root / "evaluator"
    again = load_reference(digits.root, 2, extractor, digits.open_split, cache)
    assert extractor.calls == 0
    np.testing.assert_array_equal(again.features, evaluator.reference.features)
    path = max(cache.glob("reference-*"), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])
    load_reference(digits.root, 2, extractor, digits.open_split, cache)
    assert extractor.calls == 1
    load_reference(digits.root, 2, extractor, digits.open_split, cache)
    assert extractor.calls == 1


def test_missing_extractor_weights_end_in_one_line(digits: Digits, classifier: Classifier) -> None:
    config = EvaluationConfig(extractor=Extractor.inception, extractor_path=str(digits.root))
    with pytest.raises(UserError, match=r"evaluation\.extractor=inception: .* is missing; get it from https://"):
        open_evaluator(config, digits.root, TASKS, digits.open_split, flip=False, device=CPU)
