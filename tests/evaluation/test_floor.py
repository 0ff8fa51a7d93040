"""The floor: real images through the same measures, computed once; and the distances that tell copies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import pairwise_distances

from tests.evaluation.conftest import CPU, TASKS, Digits
from trainer.config import EvaluationConfig
from trainer.evaluation import floor, reference
from trainer.evaluation.classifier import Classifier
from trainer.evaluation.evaluate import Evaluator, open_evaluator
from trainer.evaluation.floor import real_floor
from trainer.evaluation.frechet import frechet_distance, statistics
from trainer.evaluation.memorisation import memorisation


def opened(digits: Digits) -> Evaluator:
    return open_evaluator(EvaluationConfig(), digits.root, TASKS, digits.open_split, flip=False, device=CPU)


@pytest.fixture
def evaluator(digits: Digits, classifier: Classifier) -> Evaluator:
    assert classifier.classes == tuple(range(10))  # trained once for the session
    return opened(digits)


def test_train_and_test_together_are_measured_half_against_half(evaluator: Evaluator) -> None:
    """The FD worked out anew: each class's images, shuffled, the first half against the second."""
    row = real_floor(evaluator, 1, 2000)
    halves: list[list[np.ndarray]] = [[], []]
    for label in range(5):
        rows = np.random.default_rng(label).permutation(np.flatnonzero(evaluator.reference.labels == label))
        halves[0].append(evaluator.reference.features[rows[: len(rows) // 2]])
        halves[1].append(evaluator.reference.features[rows[len(rows) // 2 :]])
    first, second = (np.concatenate(half) for half in halves)
    assert (row["samples"], row["real_images"]) == (len(first), len(second)) and len(first) < 0.51 * 901
    assert row["fd"] == pytest.approx(frechet_distance(statistics(first), statistics(second)), rel=1e-3)
    assert 0 < row["fd"] < 2 and row["kld"] < 0.02 and row["accuracy"] > 0.98
    assert all(row[key] > 0.85 for key in ("precision", "recall", "density", "coverage"))
    assert "evaluator" not in row and [entry["task"] for entry in row["tasks"]] == [1]
    json.dumps(row, allow_nan=False)


def test_a_test_split_is_measured_with_train_images(
    evaluator: Evaluator, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "MIN_TEST_IMAGES", 100)
    small = opened(digits)
    assert small.reference.split == "test"
    row = real_floor(small, 2, 200)
    test = digits.open_split("test")
    assert (row["samples"], row["real_images"]) == (200, len(test))
    assert [entry["samples"] for entry in row["tasks"]] == [100, 100]  # as many of each class
    assert row["fd"] > real_floor(evaluator, 2, 2000)["fd"]  # fewer images: a higher floor


def test_computed_once_for_each_number_of_samples(evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch) -> None:
    known = real_floor(evaluator, 2, 500)
    monkeypatch.setattr(floor, "_measure", lambda *_: pytest.fail("computed again"))
    assert real_floor(evaluator, 2, 500) == known
    monkeypatch.setattr(floor, "_measure", lambda *_: {"tasks": [], "fd": 7.0})
    assert real_floor(evaluator, 2, 501)["fd"] == 7.0
    for path in evaluator.cache.glob("floor-*.json"):
        path.write_bytes(path.read_bytes()[:10])
    assert real_floor(evaluator, 2, 500)["fd"] == 7.0  # cut short: made again
    for path in evaluator.cache.glob("floor-*.json"):
        path.unlink()


def test_copies_of_a_buffer_are_found_and_fresh_images_are_not(evaluator: Evaluator, digits: Digits) -> None:
    train, test = digits.open_split("train"), digits.open_split("test")
    buffer = train.subset(np.arange(0, len(train), 30))
    copies = evaluator.look(buffer.read(np.arange(len(buffer))), None)
    found = memorisation(evaluator, copies, 2, buffer)
    assert found["learnt_images"] == found["samples"] == len(buffer) and found["held_out_images"] == len(test)
    for space in ("features", "pixels"):
        assert found[space]["memorised"] == 1.0 and found[space]["distance"] == pytest.approx(0.0, abs=1e-5)
        assert found[space]["held_out_distance"] > 0 and found[space]["held_out_memorised"] < 0.1
    fresh = evaluator.look(test.read(np.arange(len(test))), None)
    again = memorisation(evaluator, fresh, 2, buffer)
    for space in ("features", "pixels"):
        assert again[space]["memorised"] == again[space]["held_out_memorised"] == found[space]["held_out_memorised"]


def test_authenticity_of_the_train_set_written_out(evaluator: Evaluator, digits: Digits) -> None:
    train, test = digits.open_split("train"), digits.open_split("test")
    rows = np.flatnonzero(train.labels < 5)
    noisy = train.read(rows[:120]).astype(np.int64) + np.random.default_rng(0).integers(-60, 61, (120, 1, 8, 8))
    samples = evaluator.look(noisy.clip(0, 255).astype(np.uint8), None)
    found = memorisation(evaluator, samples, 1)
    real = train.read(rows).reshape(len(rows), -1).astype(np.float64)
    among = pairwise_distances(real)
    np.fill_diagonal(among, np.inf)
    for images, name in ((samples.images, ""), (test.read(np.flatnonzero(test.labels < 5)), "held_out_")):
        to_real = pairwise_distances(images.reshape(len(images), -1).astype(np.float64), real)
        nearest = to_real.argmin(axis=1)
        expected = np.mean(to_real.min(axis=1) < among.min(axis=1)[nearest])
        assert found["pixels"][f"{name}memorised"] == pytest.approx(expected)
        assert found["pixels"][f"{name}distance"] == pytest.approx(np.median(to_real.min(axis=1)) / 8)
    assert 0.1 < found["pixels"]["held_out_memorised"] < found["pixels"]["memorised"]


def test_no_cached_file_is_shared_between_evaluators(evaluator: Evaluator, tmp_path: Path) -> None:
    other = replace(evaluator, reference=replace(evaluator.reference, id="other"), root=tmp_path)
    real_floor(other, 1, 100)
    first = {path.name for path in other.cache.glob("floor-*.json")}
    real_floor(replace(other, reference=evaluator.reference), 1, 100)
    assert len({path.name for path in other.cache.glob("floor-*.json")} - first) == 1
