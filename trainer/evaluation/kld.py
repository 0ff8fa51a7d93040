"""KL(true || generated) over classes (Masip et al. 2024, arXiv 2311.14028): how far the generated mix is off."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Jeffreys' prior: half a sample is added to every class.
PSEUDO_COUNT = 0.5


def class_counts(labels: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """Samples of each class, shape (classes,), from class ids (n,)."""
    return np.bincount(labels, minlength=classes).astype(np.int64)


def class_kld(true_counts: NDArray[np.int64], generated_counts: NDArray[np.int64]) -> float:
    """KL(p || q) in nats over K classes.

    p: shares of the real images (those that the Frechet distance is taken to), of the classes seen; a class not seen
    has p = 0 and adds nothing by itself.
    q: shares of the generated images by predicted class, over all K classes, smoothed:
    q_c = (n_c + 1/2) / (N + K / 2). So a class that is never generated costs p_c log(2 p_c N) at most instead of
    infinity, and the value depends a little on N: compare equal sample counts.

    Scale, for 10 equal classes and N = 2,000: 0.002 expected of perfect sampling, 1.9 where 5 % of the samples are
    spread over 8 of the classes, 4.5 where those 8 never appear.

    Args:
        true_counts, generated_counts: samples of each class, shape (K,).
    """
    assert true_counts.shape == generated_counts.shape and true_counts.sum() > 0
    p = true_counts / true_counts.sum()
    q = (generated_counts + PSEUDO_COUNT) / (generated_counts.sum() + PSEUDO_COUNT * len(generated_counts))
    present = p > 0
    return float(np.sum(p[present] * np.log(p[present] / q[present])))
