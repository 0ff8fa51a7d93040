"""The Frechet distance against closed forms, SciPy's matrix square root and clean-fid."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from trainer.evaluation.frechet import (
    MIN_SAMPLES,
    Statistics,
    frechet_distance,
    frechet_of_features,
    statistics,
)


def random_statistics(seed: int, size: int = 24, count: int = 400) -> Statistics:
    random = np.random.default_rng(seed)
    return statistics(random.normal(size=(count, size)) @ random.normal(size=(size, size)) + random.normal(size=size))


def test_statistics_are_those_of_numpy() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    found = statistics(rows)
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(0), atol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows.astype(np.float64), rowvar=False), atol=1e-12)
    assert found.count == 50


def test_closed_form_of_gaussians_with_diagonal_covariances() -> None:
    means, deviations = np.array([[1.0, -2.0, 0.5], [0.0, 3.0, 0.5]]), np.array([[1.0, 2.0, 0.1], [3.0, 0.5, 0.1]])
    first, second = (Statistics(m, np.diag(s**2), 10) for m, s in zip(means, deviations, strict=True))
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)


def test_closed_form_of_a_rotated_pair_that_commutes() -> None:
    rotation, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))
    deviations = np.array([[1.0, 2.0, 3.0, 4.0, 5.0], [2.0, 2.0, 1.0, 0.0, 7.0]])
    first, second = (Statistics(np.zeros(5), rotation @ np.diag(s**2) @ rotation.T, 10) for s in deviations)
    expected = np.sum((deviations[0] - deviations[1]) ** 2)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)


def test_scipy_square_root_of_the_product() -> None:
    first, second = random_statistics(1), random_statistics(2)
    root = np.trace(np.real(sqrtm(first.covariance @ second.covariance)))
    gap = first.mean - second.mean
    expected = gap @ gap + np.trace(first.covariance) + np.trace(second.covariance) - 2 * root
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clean_fid() -> None:
    fid = pytest.importorskip("cleanfid.fid")
    first, second = random_statistics(3), random_statistics(4)
    expected = fid.frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    assert frechet_distance(first, second) == pytest.approx(expected, abs=1e-3)


def test_equal_sets_and_singular_covariances() -> None:
    same = random_statistics(5)
    assert frechet_distance(same, same) == pytest.approx(0.0, abs=1e-6)
    rows = np.zeros((20, 8))
    rows[:, 0] = np.arange(20)  # rank one
    moved = rows + np.eye(8)[3] * 2.0
    assert frechet_distance(statistics(rows), statistics(moved)) == pytest.approx(4.0, abs=1e-9)


def test_too_few_samples_give_no_distance() -> None:
    rows = np.random.default_rng(6).normal(size=(MIN_SAMPLES, 3))
    assert frechet_of_features(rows, rows) == pytest.approx(0.0, abs=1e-9)
    assert frechet_of_features(rows[1:], rows) is None
    assert frechet_of_features(rows, rows[1:]) is None
