"""KL of the class mix against SciPy and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import entropy

from trainer.evaluation.kld import class_counts, class_kld


def test_scipy_entropy_of_the_smoothed_shares() -> None:
    true, generated = np.array([30, 50, 20, 0]), np.array([10, 0, 70, 20])
    assert class_kld(true, generated) == pytest.approx(entropy(true / 100, (generated + 0.5) / 102), rel=1e-12)


def test_a_missing_class_is_finite_and_bounded_by_its_docstring() -> None:
    equal, two_only = np.full(10, 100), np.array([1000, 1000] + [0] * 8)
    assert class_kld(equal, two_only) == pytest.approx(4.47, abs=0.01)
    assert class_kld(equal, np.array([950, 950] + [12.5] * 8)) == pytest.approx(1.88, abs=0.01)


def test_the_true_mix_gives_nothing_and_unseen_classes_cost() -> None:
    assert class_kld(np.array([50, 50]), np.array([500, 500])) == pytest.approx(0.0, abs=1e-12)
    elsewhere = class_kld(np.array([50, 50, 0]), np.array([250, 250, 500]))  # half of the samples of a class not seen
    assert elsewhere == pytest.approx(np.log(2), abs=0.01)


def test_class_counts() -> None:
    np.testing.assert_array_equal(class_counts(np.array([3, 0, 3]), 5), [1, 0, 0, 2, 0])
