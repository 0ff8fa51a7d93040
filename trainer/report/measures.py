"""The measures that reports show: how each is called, which way is better, where it comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Measure:
    """One measure of metrics.json.

    `share`: lies in 0 ... 1 (density nearly so); `ratio`: differences are seen on a log scale; `source`: paper and
    arXiv number, as docs/run-directory.md gives them.
    """

    key: str
    title: str
    meaning: str
    source: str = ""
    higher_is_better: bool = False
    share: bool = False
    ratio: bool = False

    @property
    def sense(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"


KYNKAANNIEMI = "Kynkäänniemi et al. 2019, arXiv 1904.06991"
NAEEM = "Naeem et al. 2020, arXiv 2002.09797"
MEASURES = (
    Measure(
        *("fd", "Fréchet distance", "between features of samples and of real images; 0 is best"),
        source="Heusel et al. 2017, arXiv 1706.08500",
        ratio=True,
    ),
    Measure(
        *("kld", "KLD", "divergence of the class shares, real to generated, in nats; 0 is best"),
        source="Masip et al. 2024, arXiv 2311.14028",
    ),
    Measure(
        *("accuracy", "accuracy", "samples that the classifier takes for the class asked for"),
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("classifier_accuracy", "accuracy of the classifier learnt with the tasks", "on test images"),
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("model_accuracy", "model accuracy", "of the model's own classifier, on test images"),
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("precision", "precision", "share of samples amid real images"),
        source=KYNKAANNIEMI,
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("recall", "recall", "share of real images amid samples"),
        source=KYNKAANNIEMI,
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("density", "density", "how deep samples lie amid real images; 1 as real ones"),
        source=NAEEM,
        higher_is_better=True,
        share=True,
    ),
    Measure(
        *("coverage", "coverage", "share of real images with a sample near"),
        source=NAEEM,
        higher_is_better=True,
        share=True,
    ),
    Measure("loss", "loss", "mean squared error of the prediction on test images", ratio=True),
    Measure(
        *("bpd", "bits per dimension", "variational bound, of test images"),
        source="Ho et al. 2020, arXiv 2006.11239",
    ),
    Measure(
        *("share", "share of samples", "samples that the classifier takes for one of the task's classes"),
        higher_is_better=True,
        share=True,
    ),
)
BY_KEY = {measure.key: measure for measure in MEASURES}
FORGETTING = "Chaudhry et al. 2018, arXiv 1801.10112"
LOPEZ_PAZ = "Lopez-Paz and Ranzato 2017, arXiv 1706.08840"
ALAIN, WU = "Alain and Bengio 2016, arXiv 1610.01644", "Wu et al. 2018, arXiv 1805.01978"
MEMORISATION = "authenticity, Alaa et al. 2022, arXiv 2102.08921"


def as_array(values: Sequence[Any]) -> Values:
    """Numbers with NaN where there is none."""
    return np.array([_numbers(value) for value in values], dtype=np.float64)


def _numbers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_numbers(part) for part in value]
    return number(value) if number(value) is not None else np.nan


def number(value: object) -> float | None:
    """A finite number, else None."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
    return float(value) if known else None  # pyright: ignore[reportArgumentType]


def matrix_of(matrices: Mapping[str, Any], key: str) -> Values | None:
    """(T, T), row i after learning task i; None where the measure was not taken."""
    if not matrices.get(key):
        return None
    values = as_array(matrices[key])
    return values if np.isfinite(values).any() else None


def digits(value: float | None, measure: Measure | None = None) -> str:
    """Three significant digits or so; "" for what is not known. Shares have their three decimals."""
    if value is None or not np.isfinite(value):
        return ""
    size = abs(value)
    if measure is not None and measure.share:
        return f"{value:.3f}"
    if size >= 1000:
        return f"{value:,.0f}"
    if 0 < size < 1e-3:
        return f"{value:.1e}".replace("e-0", "e-")
    return f"{value:.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"
