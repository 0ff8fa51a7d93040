"""Measures by nearest neighbours in feature space: precision and recall, density and coverage, nearest images.

Distances are Euclidean, computed in float64 and a block of rows at a time: no matrix of all pairs is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.frechet import MIN_SAMPLES

PRECISION_NEIGHBOURS = 3  # k of precision and recall, as in their paper
DENSITY_NEIGHBOURS = 5  # k of density and coverage, as in theirs
OVERLAP_METRICS = ("precision", "recall", "density", "coverage")
MAX_IMAGES = 10_000  # of each kind: the work grows with the product
BLOCK_ELEMENTS = 4_000_000  # distances held at once, 32 MB of them


def overlap(generated: NDArray[np.floating], real: NDArray[np.floating]) -> dict[str, float | None]:
    """Precision, recall, density and coverage of generated features (n, d) against real ones (m, d).

    With B_k(x) the closed ball around x that reaches its k-th nearest neighbour among the others of its own set:
    precision: share of generated images in some B_3 of a real one; recall: share of real images in some B_3 of a
    generated one (Kynkaanniemi et al. 2019, arXiv 1904.06991, equations 1 and 2).
    density: real balls B_5 that a generated image lies in, as a mean, divided by 5; it may exceed 1. coverage: share of
    real images whose B_5 holds a generated one (Naeem et al. 2020, arXiv 2002.09797, equations 1 and 3).

    All four depend on n and m: compare equal counts only, and read them beside what real images would get. Of sets
    larger than MAX_IMAGES a fixed random part is taken.

    Returns:
        OVERLAP_METRICS; all None where either set has fewer than `frechet.MIN_SAMPLES` rows.
    """
    if min(len(generated), len(real)) < MIN_SAMPLES:
        return dict.fromkeys(OVERLAP_METRICS)
    fake_rows, real_rows = _part(generated), _part(real)
    centre = real_rows.mean(axis=0)  # distances stay, the numbers that are squared get small
    fake, true = torch.from_numpy(fake_rows - centre), torch.from_numpy(real_rows - centre)
    wide, narrow = (_radii(true, k) for k in (DENSITY_NEIGHBOURS, PRECISION_NEIGHBOURS))
    reach = _radii(fake, PRECISION_NEIGHBOURS)
    precise = dense = 0
    recalled = torch.zeros(len(true), dtype=torch.bool)
    nearest = torch.full((len(true),), torch.inf, dtype=torch.float64)
    for rows, squared in _blocks(fake, true):
        precise += int((squared <= narrow).any(dim=1).sum())
        dense += int((squared <= wide).sum())
        recalled |= (squared <= reach[rows, None]).any(dim=0)
        nearest = torch.minimum(nearest, squared.amin(dim=0))
    return {
        "precision": precise / len(fake),
        "recall": float(recalled.double().mean()),
        "density": dense / (DENSITY_NEIGHBOURS * len(fake)),
        "coverage": float((nearest <= wide).double().mean()),
    }


def nearest(
    queries: NDArray[np.generic], points: NDArray[np.generic], own: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each query's nearest point, the first of equals: distances (n,) and rows (n,); queries (n, d), points (m, d).

    Args:
        own: a row of `points` for each query that does not count, its own; -1: every row counts.
    """
    best = np.full(len(queries), np.inf)
    found = np.zeros(len(queries), dtype=np.int64)
    rows_at_once = max(1, BLOCK_ELEMENTS // max(1, queries.shape[1]))  # of the float64 copies, too
    for first in range(0, len(points), rows_at_once):
        part = torch.from_numpy(points[first : first + rows_at_once].astype(np.float64))
        for start in range(0, len(queries), rows_at_once):
            chosen = torch.from_numpy(queries[start : start + rows_at_once].astype(np.float64))
            for rows, squared in _blocks(chosen, part):
                place = slice(start + rows.start, start + rows.stop)
                if own is not None:
                    _leave_out(squared, own[place] - first)
                value, column = (result.numpy() for result in squared.min(dim=1))
                better = value < best[place]
                best[place] = np.where(better, value, best[place])
                found[place] = np.where(better, column + first, found[place])
    # Of the pairs found by their differences: an image copied exactly is at distance 0, not at 1e-5.
    exact = [
        np.linalg.norm(queries[row].astype(np.float64) - points[column], axis=-1) for row, column in enumerate(found)
    ]
    return np.asarray(exact, dtype=np.float64), found


def _part(features: NDArray[np.floating]) -> NDArray[np.float64]:
    if len(features) > MAX_IMAGES:
        features = features[np.random.default_rng(0).permutation(len(features))[:MAX_IMAGES]]
    return features.astype(np.float64)


def _radii(points: Tensor, k: int) -> Tensor:
    """Squared distance of each point to its k-th nearest among the others, (n,)."""
    radii = torch.empty(len(points), dtype=torch.float64)
    for rows, squared in _blocks(points, points):
        _leave_out(squared, np.arange(rows.start, rows.stop))
        radii[rows] = squared.topk(k, dim=1, largest=False).values[:, -1]
    return radii


def _leave_out(squared: Tensor, columns: NDArray[np.int64]) -> None:
    """No distance in one column of each row, where there is that column."""
    rows = np.flatnonzero((columns >= 0) & (columns < squared.shape[1]))
    squared[torch.from_numpy(rows), torch.from_numpy(columns[rows])] = torch.inf


def _blocks(first: Tensor, second: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Squared distances of some rows of `first` (n, d) to all of `second` (m, d), both float64: (rows, (b, m))."""
    height = max(1, BLOCK_ELEMENTS // max(1, len(second)))
    norms = second.square().sum(dim=1)
    for start in range(0, len(first), height):
        rows = slice(start, min(start + height, len(first)))
        part = first[rows]
        squared = torch.addmm(norms, part, second.T, alpha=-2.0).add_(part.square().sum(dim=1, keepdim=True))
        yield rows, squared.clamp_(min=0.0)  # rounding of equal rows may leave -1e-12
