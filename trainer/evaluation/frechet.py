"""Frechet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    d^2 = |m_1 - m_2|^2 + Tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))

for the Gaussians that have the means m and covariances C of the features. Everything is in float64.

Caution: from n samples the estimate is too high by roughly a term in 1/n that grows with the number of features
(Chong and Forsyth 2020, arXiv 1911.07023). Compare numbers of equal sample counts only; a task's own distance comes
from fewer samples than the one over all classes seen, so the two are on different footings.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

# With fewer samples than this on either side a covariance says nothing: the distance is not given at all.
MIN_SAMPLES = 16


@dataclass(frozen=True)
class Statistics:
    """Gaussian summary of n feature vectors: mean (d,), covariance (d, d)."""

    mean: Float64
    covariance: Float64
    count: int


def statistics(features: NDArray[np.floating]) -> Statistics:
    """Mean and unbiased covariance of features (n, d), n >= 2."""
    assert features.ndim == 2 and len(features) >= 2, f"statistics need two rows, got {features.shape}"
    rows = features.astype(np.float64)
    mean = rows.mean(axis=0)
    centred = rows - mean
    return Statistics(mean, centred.T @ centred / (len(rows) - 1), len(rows))


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """Squared Frechet (2-Wasserstein) distance of the two Gaussians, >= 0; what the literature reports as FID.

    Tr (C_1 C_2)^(1/2) is the sum of the square roots of the eigenvalues of C_1^(1/2) C_2 C_1^(1/2), which is symmetric
    and positive semidefinite: no complex square root appears, also where the covariances are singular.
    """
    assert first.mean.shape == second.mean.shape, "features of two extractors"
    difference = first.mean - second.mean
    root = _symmetric_root(first.covariance)
    inner = root @ second.covariance @ root
    eigenvalues = np.linalg.eigvalsh((inner + inner.T) / 2)
    cross = np.sqrt(np.clip(eigenvalues, 0.0, None)).sum()
    distance = difference @ difference + np.trace(first.covariance) + np.trace(second.covariance) - 2.0 * cross
    return max(float(distance), 0.0)  # rounding of equal inputs may leave -1e-12


def frechet_of_features(generated: NDArray[np.floating], real: NDArray[np.floating]) -> float | None:
    """Distance between feature sets (n, d) and (m, d); None where either has fewer than MIN_SAMPLES rows."""
    if min(len(generated), len(real)) < MIN_SAMPLES:
        return None
    return frechet_distance(statistics(generated), statistics(real))


def _symmetric_root(matrix: Float64) -> Float64:
    """Square root of a symmetric positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
