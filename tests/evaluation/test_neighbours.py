"""Precision, recall, density and coverage against scikit-learn's neighbours and against closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from trainer.evaluation import neighbours
from trainer.evaluation.frechet import MIN_SAMPLES
from trainer.evaluation.neighbours import OVERLAP_METRICS, nearest, overlap


def reference(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """The definitions written out, with all distances at once, by scikit-learn in float64."""

    def radii(points: np.ndarray, k: int) -> np.ndarray:
        found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points).kneighbors()  # of the others
        return found[0][:, -1]

    pairs = np.linalg.norm(generated[:, None, :] - real[None, :, :], axis=2)  # (n, m)
    return {
        "precision": float((pairs <= radii(real, 3)).any(axis=1).mean()),
        "recall": float((pairs <= radii(generated, 3)[:, None]).any(axis=0).mean()),
        "density": float((pairs <= radii(real, 5)).sum(axis=1).mean() / 5),
        "coverage": float((pairs <= radii(real, 5)).any(axis=0).mean()),
    }


def cloud(seed: int, count: int, size: int = 12, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (count, size))


@pytest.mark.parametrize(("counts", "shift"), [((300, 300), 0.0), ((150, 420), 0.7), ((400, 90), 3.0)])
def test_definitions_written_out(counts: tuple[int, int], shift: float) -> None:
    generated, real = cloud(1, counts[0], shift=shift), cloud(2, counts[1])
    found = overlap(generated, real)
    assert list(found) == list(OVERLAP_METRICS)
    assert found == pytest.approx(reference(generated, real), abs=1e-12)


def test_far_from_the_origin_nothing_is_lost() -> None:
    """|a|^2 + |b|^2 - 2 a.b of float32 numbers around 1,000 has no digit left of these distances."""
    generated, real = (cloud(seed, 200, 3).astype(np.float32) * 0.01 + 1000 for seed in (1, 2))
    expected = reference(generated.astype(np.float64), real.astype(np.float64))
    assert overlap(generated, real) == pytest.approx(expected, abs=1e-12)


def test_blocks_are_small_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    generated, real = cloud(1, 230), cloud(2, 170)
    whole = overlap(generated, real), nearest(generated, real)
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 1000)
    held: list[int] = []
    original = neighbours._blocks

    def watched(first: torch.Tensor, second: torch.Tensor):  # noqa: ANN202
        for rows, squared in original(first, second):
            held.append(squared.numel())
            yield rows, squared

    monkeypatch.setattr(neighbours, "_blocks", watched)
    assert overlap(generated, real) == pytest.approx(whole[0], abs=1e-12)
    assert max(held) <= 1000 and len(held) > 100
    for parts, at_once in zip(nearest(generated, real), whole[1], strict=True):
        np.testing.assert_allclose(parts, at_once, rtol=1e-12)


def test_what_the_four_numbers_tell_apart() -> None:
    """One of two modes: precise, but half of the real images are not reached. Noise around both: the reverse."""
    left, right = cloud(1, 300, 2), cloud(2, 300, 2, shift=50.0)
    real = np.concatenate([left, right])
    dropped = overlap(cloud(3, 600, 2), real)
    assert dropped["precision"] is not None and dropped["recall"] is not None and dropped["coverage"] is not None
    assert dropped["precision"] > 0.9 and dropped["recall"] < 0.55 and dropped["coverage"] < 0.55
    noisy = overlap(np.concatenate([cloud(4, 300, 2), cloud(5, 300, 2, shift=50.0)]) + 20 * cloud(6, 600, 2), real)
    assert noisy["precision"] is not None and noisy["density"] is not None
    assert noisy["precision"] < 0.3 and noisy["density"] < 0.3


def test_large_sets_are_thinned_and_small_ones_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = cloud(1, 200), cloud(2, 200)
    assert overlap(generated[: MIN_SAMPLES - 1], real) == dict.fromkeys(OVERLAP_METRICS)
    assert overlap(generated, real[: MIN_SAMPLES - 1]) == dict.fromkeys(OVERLAP_METRICS)
    monkeypatch.setattr(neighbours, "MAX_IMAGES", 50)
    kept = np.random.default_rng(0).permutation(200)[:50]
    assert overlap(generated, real) == pytest.approx(reference(generated[kept], real[kept]), abs=1e-12)


def test_nearest_is_that_of_scikit_learn_without_the_own_row() -> None:
    points = np.random.default_rng(1).integers(0, 256, (120, 30), dtype=np.uint8)
    queries = np.concatenate([points[:20], np.random.default_rng(2).integers(0, 256, (50, 30), dtype=np.uint8)])
    model = NearestNeighbors(n_neighbors=2, algorithm="brute").fit(points.astype(np.float64))
    distance, row = model.kneighbors(queries.astype(np.float64))
    found, where = nearest(queries, points)
    np.testing.assert_allclose(found, distance[:, 0], atol=1e-12)
    assert where.tolist() == row[:, 0].tolist()
    own = np.where(np.arange(70) < 20, np.arange(70), -1)
    found, where = nearest(queries, points, own)
    expected = np.where(own >= 0, 1, 0)
    np.testing.assert_allclose(found, distance[np.arange(70), expected], atol=1e-12)
    assert where.tolist() == row[np.arange(70), expected].tolist()
