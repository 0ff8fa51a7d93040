"""Probes of features, against scikit-learn called directly and a vote counted by hand."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trainer.config import DiffusionConfig, Prediction
from trainer.diffusion.likelihood import Posterior
from trainer.diffusion.schedules import betas, make_schedule
from trainer.evaluation.generate import share_indices
from trainer.evaluation.real_images import Measured, RealImages
from trainer.evaluation.representation import Represented, features_at, probe_choice, probe_row

CONFIG = DiffusionConfig(timesteps=300, prediction=Prediction.v)
LEVELS = [0, 40, 299]
COUNT = 40


def real() -> RealImages:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (COUNT, 1, 4, 4), dtype=np.uint8)
    keys = random.integers(0, 2**63, COUNT, dtype=np.uint64)
    return RealImages(images, np.arange(COUNT) % 2, keys, np.ones(COUNT, dtype=np.int64))


def measured(batch: int = 7) -> Measured:
    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        raise AssertionError("probes ask for no prediction")

    device = torch.device("cpu")
    return Measured(predict, make_schedule(CONFIG), Posterior.of(CONFIG), seed=3, batch=batch, device=device)


def told(x: Tensor, t: Tensor) -> Tensor:
    """All that an encoder is given, as its features."""
    return torch.cat([x.flatten(1), t[:, None].float()], dim=1)


def test_each_image_is_noised_once_for_each_timestep_in_float64() -> None:
    features = features_at(measured(), told, real(), LEVELS)
    assert features.shape == (COUNT, 3, 17) and features.dtype == torch.float32
    assert features[:, :, 16].tolist() == [[0.0, 40.0, 299.0]] * COUNT
    alpha_bar = torch.cumprod(1.0 - betas(CONFIG), 0)[LEVELS][None, :, None]
    x0 = torch.from_numpy(real().images).double().flatten(1)[:, None] / 127.5 - 1.0
    noise = ((features[:, :, :16].double() - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt())[:, 1:]
    assert abs(float(noise.mean())) < 0.1 and float(noise.std()) == pytest.approx(1.0, abs=0.1)
    correlation = np.corrcoef(noise[:, 0].flatten(), noise[:, 1].flatten())[0, 1]
    assert abs(correlation) < 0.15  # noise of its own at each timestep


def test_neither_batch_nor_ranks_nor_other_levels_change_the_noise() -> None:
    images, whole = real(), features_at(measured(1000), told, real(), LEVELS)
    shares = [
        features_at(measured(), told, images.take(share_indices(COUNT, rank, 3) % COUNT), LEVELS) for rank in range(3)
    ]
    torch.testing.assert_close(torch.cat(shares)[:COUNT], whole, rtol=0, atol=0)
    torch.testing.assert_close(features_at(measured(), told, images, [40])[:, 0], whole[:, 1], rtol=0, atol=0)
    other = features_at(replace(measured(), seed=4), told, images, LEVELS)
    assert not torch.allclose(other[:, 1], whole[:, 1], atol=0.1)


def clouds(count: int, seed: int, spread: float) -> Represented:
    """Three classes, named 2, 5 and 9, around points of their own; each level of noise spreads them more. The features
    have very different scales."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.repeat([2, 5, 9], count // 3))
    centres = np.random.default_rng(9).normal(size=(10, 6))
    noise = random.normal(size=(len(labels), 2, 6)) * np.array([spread, 4 * spread])[:, None]
    scales = np.array([1.0, 1e3, 1e-3, 1.0, 10.0, 1.0])
    return Represented(((centres[labels][:, None] + noise) * scales).astype(np.float32), labels)


def vote(train: Represented, test: Represented, level: int, neighbours: int) -> float:
    """Share of test images whose nearest training images vote for their class; ties go to the lowest class id."""
    x, z = train.features[:, level].astype(np.float64), test.features[:, level].astype(np.float64)
    middle, deviation = x.mean(axis=0), x.std(axis=0)
    x, z = (x - middle) / deviation, (z - middle) / deviation
    hits = 0
    for point, label in zip(z, test.labels, strict=True):
        nearest = np.argsort(((x - point) ** 2).sum(axis=1))[:neighbours]
        votes = Counter(train.labels[nearest].tolist())
        hits += min(votes, key=lambda name: (-votes[name], name)) == label
    return hits / len(test.labels)


def test_probes_are_scikit_learns_on_features_of_one_scale() -> None:
    train, test = clouds(150, 0, 0.4), clouds(90, 1, 0.4)
    row = probe_row(train, test, [10, 20], 5)
    for level in range(2):
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        probe.fit(train.features[:, level].astype(np.float64), train.labels)
        told = probe.predict(test.features[:, level].astype(np.float64))
        assert row["linear"][level] == pytest.approx(np.mean(told == test.labels), abs=0.012)
        assert row["knn"][level] == pytest.approx(vote(train, test, level, 5))
    assert row["linear"][0] > 0.9 > row["linear"][1] > 1 / 3  # more noise, less to find
    assert (row["timesteps"], row["neighbours"], row["images"], row["test_images"]) == ([10, 20], 5, 150, 90)
    assert row == probe_row(train, test, [10, 20], 5)


def test_nothing_to_find_is_found_by_chance_alone() -> None:
    train, test = clouds(300, 0, 1e6), clouds(300, 1, 1e6)
    row = probe_row(train, test, [0, 1], 5)
    assert np.allclose(row["linear"] + row["knn"], 1 / 3, atol=0.1)


def test_one_class_and_features_of_a_model_that_diverged_have_no_probes() -> None:
    train, test = clouds(30, 0, 0.1), clouds(30, 1, 0.1)
    alone = Represented(train.features[train.labels == 5], train.labels[train.labels == 5])
    assert probe_row(alone, alone, [0, 1], 5)["linear"] == [None, None]
    test.features[3, 1, 2] = np.nan
    row = probe_row(train, test, [0, 1], 5)
    assert row["linear"] == [1.0, None] and row["knn"] == [1.0, None]
    json.dumps(row, allow_nan=False)


def test_as_many_images_of_each_class_whatever_their_order() -> None:
    random = np.random.default_rng(0)
    keys, labels = random.integers(0, 2**63, 100, dtype=np.uint64), np.repeat([4, 1, 7], [60, 37, 3])
    chosen = probe_choice(keys, labels, 5, seed=1)
    assert labels[chosen].tolist() == [1] * 5 + [4] * 5 + [7] * 3
    turn = random.permutation(100)
    assert keys[turn][probe_choice(keys[turn], labels[turn], 5, seed=1)].tolist() == keys[chosen].tolist()
    assert set(chosen) != set(probe_choice(keys, labels, 5, seed=2))
