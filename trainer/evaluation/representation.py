"""What the features of a model's encoder tell of the class: probes learn it from them, at each level of noise.

A linear probe (Alain and Bengio 2016, arXiv 1610.01644; at each noise level of a diffusion model, Xiang et al. 2023,
arXiv 2303.09769) and a vote of the nearest neighbours, on `Denoiser.features` of real images, noised once for each
timestep. The probes learn from images of all classes seen: what they tell is what the features hold, whether or not
the model can still denoise or name it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluation.real_images import Measured, RealImages, pairs
from trainer.kernels.noise import add_noise
from trainer.seeds import derive, smallest_of_each

Encode = Callable[[Tensor, Tensor], Tensor]
Float32 = NDArray[np.float32]
ITERATIONS = 1000  # at most, of the logistic regression


@dataclass(frozen=True)
class Represented:
    """Features (N, K, F) of images at K timesteps, and their class ids (N,)."""

    features: Float32
    labels: NDArray[np.int64]


def probe_choice(keys: NDArray[np.uint64], labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Indices of at most `count` images of each class: a function of the seed and their keys alone."""
    return smallest_of_each(seed, "evaluation-probe-choice", keys, labels, count)


@torch.no_grad()
def features_at(measured: Measured, encode: Encode, real: RealImages, timesteps: Sequence[int]) -> Tensor:
    """Features of each image at each timestep: fp32 (N, K, F) on the CPU.

    The noise is a function of (run seed, image, timestep), the same for every model.

    Args:
        encode: noisy images (B, C, H, W) and timesteps (B,) -> features (B, F).
    """
    schedule, device, levels = measured.schedule, measured.device, torch.tensor(timesteps, dtype=torch.int64)
    parts: list[Tensor] = []
    for part, _, columns in pairs(real, len(levels), measured.batch):
        t = levels[columns]
        seeds = derive(measured.seed, "evaluation-probe-noise", part.keys, t.numpy().astype(np.uint64))
        images, noise, t = (value.to(device) for value in (torch.from_numpy(part.images), torch.from_numpy(seeds), t))
        x, _ = add_noise(
            images, noise, t, schedule.signal, schedule.sigma, flip=None, predict_v=False, dtype=torch.float32
        )
        parts.append(encode(x, t).float().cpu())
    return torch.cat(parts).view(len(real), len(levels), -1)


def probe_row(train: Represented, test: Represented, timesteps: Sequence[int], neighbours: int) -> dict[str, Any]:
    """Accuracies of probes that learn from `train`, on `test`, as JSON values.

    Returns:
        timesteps (K,), with linear and knn (K,), the accuracies there: None where there is one class alone, which
        needs no telling, or features are not finite; neighbours that vote; images learnt from; test_images.
    """
    scores = [
        _scores(train.features[:, k], train.labels, test.features[:, k], test.labels, neighbours)
        for k in range(len(timesteps))
    ]
    return {
        "timesteps": list(timesteps),
        "linear": [linear for linear, _ in scores],
        "knn": [knn for _, knn in scores],
        "neighbours": neighbours,
        "images": len(train.labels),
        "test_images": len(test.labels),
    }


def _scores(
    x: Float32, y: NDArray[np.int64], x_test: Float32, y_test: NDArray[np.int64], neighbours: int
) -> tuple[float | None, float | None]:
    """Accuracies of the linear probe and of the neighbours' vote, both on features of mean 0 and deviation 1."""
    from sklearn.exceptions import ConvergenceWarning  # a second of imports, for a measure that is off by default
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(y)) < 2 or not (np.isfinite(x).all() and np.isfinite(x_test).all()):
        return None, None
    scaler = StandardScaler().fit(x.astype(np.float64))
    scaled, scaled_test = (scaler.transform(part.astype(np.float64)) for part in (x, x_test))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one that stops early is a probe as well
        linear = LogisticRegression(max_iter=ITERATIONS).fit(scaled, y)
    nearest = KNeighborsClassifier(min(neighbours, len(y))).fit(scaled, y)
    return float(linear.score(scaled_test, y_test)), float(nearest.score(scaled_test, y_test))
