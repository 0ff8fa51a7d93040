"""Losses by timestep bin and the bound on the likelihood, with predictors whose answers are known."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from trainer.config import DiffusionConfig, Prediction
from trainer.diffusion.likelihood import Posterior, timestep_strata
from trainer.diffusion.schedules import betas, make_schedule
from trainer.evaluation.generate import share_indices
from trainer.evaluation.real_images import (
    Measured,
    RealImages,
    bin_losses,
    bound_row,
    bound_terms,
    loss_row,
    smallest_seeds,
    timestep_bins,
)

CPU = torch.device("cpu")
COUNT, BINS = 12, 5
Seen = list[tuple[Tensor, Tensor, Tensor | None]]


def real(count: int = COUNT) -> RealImages:
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)
    keys = random.integers(0, 2**63, count, dtype=np.uint64)
    return RealImages(images, np.arange(count) % 3, keys, np.repeat([1, 2, 3], count // 3))


def wobble(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """Depends on everything that it is given."""
    assert label is not None
    return 0.3 * torch.tanh(x + 0.1 * label[:, None, None, None]) + (t / 500.0)[:, None, None, None]


def measured(config: DiffusionConfig, batch: int = 7, seen: Seen | None = None) -> Measured:
    def predict(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        if seen is not None:
            seen.append((x, t, label))
        return wobble(x, t, label)

    return Measured(predict, make_schedule(config), Posterior.of(config), seed=3, batch=batch, device=CPU)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_losses_are_those_of_the_noise_in_float64(prediction: Prediction) -> None:
    """The noise is worked out of the x_t that the model was shown."""
    config, seen, images = DiffusionConfig(timesteps=100, prediction=prediction), Seen(), real()
    losses = bin_losses(measured(config, seen=seen), images, BINS)
    x, t = torch.cat([x for x, _, _ in seen]).double(), torch.cat([t for _, t, _ in seen])
    label = torch.cat([label for _, _, label in seen if label is not None])
    assert losses.shape == (COUNT, BINS) and len(x) == COUNT * BINS
    assert (t.view(COUNT, BINS) // 20).tolist() == [list(range(BINS))] * COUNT  # each image once in each bin
    assert label.view(COUNT, BINS)[:, 0].tolist() == images.labels.tolist()
    alpha_bar = torch.cumprod(1.0 - betas(config), 0)[t][:, None, None, None]
    x0 = torch.from_numpy(images.images).double().repeat_interleave(BINS, dim=0) / 127.5 - 1.0
    noise = (x - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
    target = noise if prediction is Prediction.epsilon else alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    expected = (wobble(x, t, label) - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.double().flatten(), expected, rtol=1e-3, atol=0.0)
    assert abs(float(noise.mean())) < 0.15 and float(noise.std()) == pytest.approx(1.0, abs=0.1)


def test_neither_batch_nor_ranks_nor_order_change_anything_but_rounding() -> None:
    config, images = DiffusionConfig(timesteps=100), real()
    for function, count in ((bin_losses, BINS), (bound_terms, 9)):
        whole = function(measured(config, batch=1000), images, count)
        shares = [
            function(measured(config), images.take(share_indices(COUNT, rank, 5) % COUNT), count) for rank in range(5)
        ]
        torch.testing.assert_close(torch.cat(shares)[:COUNT], whole, rtol=1e-5, atol=0.0)
        turned = function(measured(config), images.take(np.arange(COUNT)[::-1]), count)
        torch.testing.assert_close(turned.flip(0), whole, rtol=1e-5, atol=0.0)
        other = function(replace(measured(config), seed=4), images, count)
        assert not torch.allclose(other, whole, rtol=0.1)


def test_a_choice_depends_on_keys_alone() -> None:
    keys = real(30).keys
    chosen = keys[smallest_seeds(keys, 10, seed=1)]
    turned = keys[::-1]
    assert turned[smallest_seeds(turned, 10, seed=1)].tolist() == chosen.tolist()
    assert set(chosen) != set(keys[smallest_seeds(keys, 10, seed=2)]) and len(set(chosen)) == 10
    assert smallest_seeds(keys, 99, seed=1).size == 30


def test_bins_are_equal() -> None:
    assert timestep_bins(1000, 10).tolist() == list(range(0, 1001, 100))
    assert timestep_bins(10, 4).diff().tolist() == [2, 3, 3, 2]


def test_the_full_bound_is_a_sum_of_divergences_in_float64() -> None:
    """Every timestep once: KL of the Gaussians written out, from the x_t that the model was shown."""
    config, seen, images = DiffusionConfig(timesteps=30, beta_end=0.2), Seen(), real()
    terms = bound_terms(measured(config, seen=seen), images, 29)
    assert terms.shape == (COUNT, 31) and terms.dtype == torch.float64
    x, t = torch.cat([x for x, _, _ in seen]).double(), torch.cat([t for _, t, _ in seen])
    label = torch.cat([label for _, _, label in seen if label is not None])
    assert t.view(COUNT, 30)[5].tolist() == list(range(30))
    beta = betas(config)
    alpha_bar = torch.cumprod(1.0 - beta, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    a, b, p = (table[t][:, None, None, None] for table in (alpha_bar, beta, before))
    x0 = torch.from_numpy(images.images).double().repeat_interleave(30, dim=0) / 127.5 - 1.0
    guess = ((x - (1 - a).sqrt() * wobble(x, t, label)) / a.sqrt()).clamp(-1.0, 1.0)
    state = (1 - b).sqrt() * (1 - p) / (1 - a) * x
    posterior, model = (state + p.sqrt() * b / (1 - a) * image for image in (x0, guess))
    deviation = (b * (1 - p) / (1 - a)).sqrt().clamp(min=1e-12)
    divergence = kl_divergence(Normal(posterior, deviation), Normal(model, deviation)).mean(dim=(1, 2, 3)) / np.log(2)
    found, later = terms[:, 1:], (t > 0).view(COUNT, 30)
    torch.testing.assert_close(found[later], divergence.view(COUNT, 30)[later], rtol=1e-4, atol=0.0)
    last = alpha_bar[-1]
    prior = kl_divergence(Normal(last.sqrt() * x0[::30], (1 - last).sqrt()), Normal(0.0, 1.0))
    torch.testing.assert_close(terms[:, 0], prior.mean(dim=(1, 2, 3)) / np.log(2), rtol=1e-5, atol=1e-9)


def test_few_timesteps_estimate_the_full_bound_without_bias() -> None:
    """The mean over many images agrees with the sum over all timesteps within its own standard error."""
    config, images = DiffusionConfig(timesteps=100, beta_end=0.1), real(300)
    full = bound_terms(measured(config, batch=4000), images, 99).sum(dim=1)
    few = bound_terms(measured(config, batch=4000), images, 12)
    assert few.shape == (300, 14)
    gap = few.sum(dim=1) - full
    assert abs(float(gap.mean())) < 4 * float(gap.std()) / np.sqrt(300)
    assert float(gap.std()) > 0
    edges = timestep_strata(100, 12).tolist()
    row = bound_row(few.numpy(), images.tasks, 3, edges)
    assert row["bpd"] == pytest.approx(row["bpd_prior"] + row["bpd_decoder"] + sum(row["bpd_terms"]))
    assert row["bpd"] == pytest.approx(np.mean([entry["bpd"] for entry in row["tasks"]]))
    assert row["bpd_standard_error"] == pytest.approx(float(few.sum(dim=1).std()) / np.sqrt(300))
    assert row["bpd_images"] == 300 and len(row["bpd_terms"]) == len(row["bpd_edges"]) - 1 == 12


def test_rows_are_json_and_keep_tasks_apart() -> None:
    losses, tasks = np.array([[1.0, 3.0], [2.0, 4.0], [9.0, np.nan]], dtype=np.float32), np.array([1, 2, 3])
    row = loss_row(losses, tasks, 2)
    assert row["loss_bins"] == [1.5, 3.5] and row["loss"] == 2.5 and row["loss_images"] == 2
    assert [entry["loss_bins"] for entry in row["tasks"]] == [[1.0, 3.0], [2.0, 4.0]]
    assert row["next_task"] == {"task": 3, "loss": None, "loss_bins": [9.0, None], "loss_images": 1}
    assert "next_task" not in loss_row(losses, tasks, 3)
    single = bound_row(np.ones((1, 3)), np.array([1]), 1, [1, 2])
    assert single["bpd"] == 3.0 and single["bpd_standard_error"] is None
    json.dumps([row, single], allow_nan=False)
