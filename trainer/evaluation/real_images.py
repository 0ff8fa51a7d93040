"""What a model makes of real images: its loss in each bin of timesteps, and the bound on their likelihood.

Every random number is a function of (run seed, purpose, sample key, bin): the same images are noised in the same way
whatever model is measured, by however many ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Prediction
from trainer.diffusion.likelihood import Posterior, decoder_term, prior_term, step_term, timestep_strata
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.ddim import x0_and_noise
from trainer.kernels.noise import add_noise, normalise
from trainer.kernels.philox import uniform
from trainer.seeds import derive, smallest

Predict = Callable[[Tensor, Tensor, Tensor | None], Tensor]
BITS = 1.0 / float(np.log(2.0))  # of a nat


@dataclass(frozen=True)
class RealImages:
    """images (N, C, H, W) uint8, labels (N,) class ids, keys (N,) on which their noise depends, tasks (N,)."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    keys: NDArray[np.uint64]
    tasks: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: NDArray[np.int64]) -> RealImages:
        return RealImages(self.images[indices], self.labels[indices], self.keys[indices], self.tasks[indices])


@dataclass(frozen=True)
class Measured:
    """The model under test and how real images are put to it; `batch` images are predicted at once.

    `posterior` on the same device as `schedule`.
    """

    predict: Predict
    schedule: NoiseSchedule
    posterior: Posterior
    seed: int
    batch: int
    device: torch.device


def smallest_seeds(keys: NDArray[np.uint64], count: int, seed: int) -> NDArray[np.int64]:
    """A random choice of `count` samples, (n,): a function of the seed and their keys alone, not of their order."""
    return smallest(seed, "evaluation-real", keys, count)


def timestep_bins(timesteps: int, bins: int) -> Tensor:
    """Edges of equal bins of the timesteps 0 ... T - 1, int64 (bins + 1,): bin k is edges[k] ... edges[k + 1] - 1."""
    return (torch.arange(bins + 1, dtype=torch.float64) * timesteps / bins).round().to(torch.int64)


@torch.no_grad()
def bin_losses(measured: Measured, real: RealImages, bins: int) -> Tensor:
    """Squared error of the prediction (eps or v), mean over pixels, of each image in each bin: fp32 (N, bins), CPU.

    In each bin an image has one timestep, drawn evenly from it, and noise of its own, the same for every model.
    """
    edges = timestep_bins(measured.schedule.timesteps, bins)
    losses = torch.empty(len(real), bins)
    for part, rows, columns in pairs(real, bins, measured.batch):
        noised = _noise(measured, part, columns, edges, "loss")
        prediction = measured.predict(noised.x, noised.t, noised.label).float()
        losses[rows, columns] = (prediction - noised.target).square().flatten(1).mean(dim=1).cpu()
    return losses


@torch.no_grad()
def bound_terms(measured: Measured, real: RealImages, count: int) -> Tensor:
    """The variational bound of each image in bits a dimension: float64 (N, 2 + K) on the CPU.

    Columns: the prior term, the decoder, then the sums of L_t over `timestep_strata(T, count)`, each estimated without
    bias by one timestep drawn from the stratum, times its size. The predicted x_0 is clipped to [-1, 1], where images
    are (Ho et al. 2020 do the same). A conditional model is given the class: the bound is then on log p(x | y).
    """
    strata = timestep_strata(measured.schedule.timesteps, count)
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), strata])  # timestep 0 before them: the decoder
    widths = edges.diff().double()
    terms = torch.empty(len(real), 1 + len(widths), dtype=torch.float64)
    for part, rows, columns in pairs(real, len(widths), measured.batch):
        noised = _noise(measured, part, columns, edges, "bound")
        nats = _terms_at(measured, noised).cpu()
        terms[rows, 1 + columns] = nats * widths[columns]
    for start in range(0, len(real), measured.batch):
        chosen = slice(start, start + measured.batch)
        terms[chosen, 0] = prior_term(normalise(torch.from_numpy(real.images[chosen])), measured.posterior)
    return terms * (BITS / real.images[0].size)


def loss_row(losses: NDArray[np.float32], tasks: NDArray[np.int64], after_task: int) -> dict[str, Any]:
    """The part of a row that `bin_losses` gives, as JSON values; None where a loss is not finite.

    Args:
        losses: (N, bins).
        tasks: the task of each image (N,), 1 ... `after_task` and, where there is one, the next.

    Returns:
        loss (mean over images of all tasks learnt and over bins), loss_bins, loss_images; the same for each of `tasks`
        and, not learnt yet, for `next_task`.
    """

    def part(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        bins = losses[chosen].astype(np.float64).mean(axis=0)
        return {
            "loss": number(bins.mean()),
            "loss_bins": [number(value) for value in bins],
            "loss_images": int(chosen.sum()),
        }

    row = part(tasks <= after_task)
    row["tasks"] = [{"task": task, **part(tasks == task)} for task in range(1, after_task + 1)]
    if (tasks > after_task).any():
        row["next_task"] = {"task": after_task + 1, **part(tasks > after_task)}
    return row


def bound_row(
    terms: NDArray[np.float64], tasks: NDArray[np.int64], after_task: int, edges: list[int]
) -> dict[str, Any]:
    """The part of a row that `bound_terms` gives, as JSON values; None where a term is not finite.

    Args:
        terms: (N, 2 + K).
        tasks: the task of each image (N,), 1 ... `after_task`.
        edges: of the K strata, (K + 1,).

    Returns:
        bpd, the bound in bits a dimension; bpd_standard_error, over images, the draws of timestep and noise included;
        bpd_prior, bpd_decoder and bpd_terms (K), which add up to it; bpd_edges; bpd_images; the first two and the count
        for each of `tasks`.
    """

    def part(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        totals = terms[chosen].sum(axis=1)
        error = totals.std(ddof=1) / np.sqrt(len(totals)) if len(totals) > 1 else np.nan
        return {"bpd": number(totals.mean()), "bpd_standard_error": number(error), "bpd_images": len(totals)}

    prior, decoder, *steps = (number(value) for value in terms.mean(axis=0))
    row = part(np.ones(len(terms), dtype=np.bool_))
    row |= {"bpd_prior": prior, "bpd_decoder": decoder, "bpd_terms": steps, "bpd_edges": edges}
    row["tasks"] = [{"task": task, **part(tasks == task)} for task in range(1, after_task + 1)]
    return row


def number(value: float | np.floating) -> float | None:
    """As JSON has it: None for what is not finite."""
    return float(value) if np.isfinite(value) else None


@dataclass(frozen=True)
class _Noised:
    x0: Tensor
    x: Tensor
    t: Tensor
    label: Tensor
    target: Tensor


def pairs(real: RealImages, columns: int, batch: int) -> Iterator[tuple[RealImages, Tensor, Tensor]]:
    """Every (image, column) in batches: the images, their rows and the columns, int64 (b,) each."""
    total = len(real) * columns
    for start in range(0, total, batch):
        pair = np.arange(start, min(start + batch, total), dtype=np.int64)
        rows = pair // columns
        yield real.take(rows), torch.from_numpy(rows), torch.from_numpy(pair % columns)


def _noise(measured: Measured, part: RealImages, columns: Tensor, edges: Tensor, purpose: str) -> _Noised:
    """Each image at a timestep of its own within its column's edges."""
    schedule, device = measured.schedule, measured.device
    draws = columns.numpy().astype(np.uint64)
    seeds, noise = (
        torch.from_numpy(derive(measured.seed, f"evaluation-{purpose}-{what}", part.keys, draws)).to(device)
        for what in ("timestep", "noise")
    )
    low, high = edges[columns].to(device), edges[columns + 1].to(device) - 1
    t = torch.minimum(low + (uniform(seeds, 1)[:, 0] * (high - low + 1)).to(torch.int64), high)
    x0 = normalise(torch.from_numpy(part.images).to(device))
    predict_v = schedule.prediction is Prediction.v
    x, target = add_noise(
        x0, noise, t, schedule.signal, schedule.sigma, flip=None, predict_v=predict_v, dtype=torch.float32
    )
    return _Noised(x0, x, t, torch.from_numpy(part.labels).to(device), target)


def _terms_at(measured: Measured, noised: _Noised) -> Tensor:
    """L_t in nats, the decoder's where t is 0: float64 (b,)."""
    schedule = measured.schedule
    signal, sigma = (table[noised.t][:, None, None, None] for table in (schedule.signal, schedule.sigma))
    prediction = measured.predict(noised.x, noised.t, noised.label).float()
    predict_v = schedule.prediction is Prediction.v
    guess = x0_and_noise(noised.x, prediction, signal, sigma, predict_v=predict_v)[0].clamp(-1.0, 1.0)
    step = step_term(noised.x0, guess, noised.t, measured.posterior)
    return torch.where(noised.t > 0, step, decoder_term(noised.x0, guess, measured.posterior))
