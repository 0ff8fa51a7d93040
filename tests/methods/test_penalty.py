"""Penalties against autograd on the whole vector in float64, whole and cut into the parts that ranks hold."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import Config, MethodName, PenaltyName
from trainer.methods import Memory, Penalty, build_penalty

WEIGHT, TASKS, SIZE = 3.7, 4, 50
KINDS = [PenaltyName.l2, PenaltyName.ewc, PenaltyName.rank1_ewc]


def draw(seed: int) -> Tensor:
    return torch.randn(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


THETA = draw(0)
ANCHORS = [draw(10 + task) for task in range(TASKS)]
FISHERS = [draw(20 + task).square() for task in range(TASKS)]
MUS = [draw(30 + task) for task in range(TASKS)]
SCALES = [0.3 + task for task in range(TASKS)]
for fisher in FISHERS:
    fisher[7:11] = 0.0  # weights that no task cares for
FISHERS[0][3:5] = 0.0  # that the first task does not


def equation(kind: PenaltyName, theta: Tensor) -> Tensor:
    if kind is PenaltyName.l2:
        return WEIGHT / 2 * (theta - ANCHORS[-1]).square().sum()
    if kind is PenaltyName.ewc:
        terms = [(fisher * (theta - anchor).square()).sum() for fisher, anchor in zip(FISHERS, ANCHORS, strict=True)]
    else:
        parts = zip(SCALES, MUS, ANCHORS, strict=True)
        terms = [scale * (mu @ (theta - anchor)).square() for scale, mu, anchor in parts]
    return WEIGHT / 2 * torch.stack(terms).sum()


def build(kind: PenaltyName, cuts: Sequence[int]) -> Penalty:
    """A penalty that remembers all tasks, on the stretches of the vector between these places."""
    config = Config()
    config.method.name, config.method.penalty, config.method.penalty_weight = MethodName.finetune, kind, WEIGHT
    penalty = build_penalty(config)
    assert penalty is not None
    fishers = {PenaltyName.l2: [torch.empty(0)] * TASKS, PenaltyName.ewc: FISHERS, PenaltyName.rank1_ewc: MUS}[kind]
    for anchor, fisher, scale in zip(ANCHORS, fishers, SCALES, strict=True):
        penalty.remember(Memory(pieces(anchor, cuts), pieces(fisher, cuts) if len(fisher) else [], scale))
    return penalty


def pieces(vector: Tensor, cuts: Sequence[int]) -> list[Tensor]:
    return [vector[begin:end].clone() for begin, end in pairwise(cuts)]


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_and_value_are_those_of_the_equation(kind: PenaltyName) -> None:
    theta = THETA.clone().requires_grad_()
    expected = equation(kind, theta)
    expected.backward()
    assert theta.grad is not None
    cuts = [0, 13, SIZE]
    gradients, value = build(kind, cuts).grad(pieces(THETA, cuts), lambda share: share)
    torch.testing.assert_close(torch.cat(gradients), theta.grad, rtol=1e-12, atol=1e-12)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_are_the_whole(kind: PenaltyName) -> None:
    """Three ranks with an uneven part each: what a rank cannot know comes through `total`."""
    whole, value = build(kind, [0, SIZE]).grad([THETA.clone()], lambda share: share)
    places = [[0, 4, 21], [21, 22], [22, SIZE]]
    parts = [build(kind, cuts) for cuts in places]
    shares = list[Tensor]()
    for penalty, cuts in zip(parts, places, strict=True):
        penalty.grad(pieces(THETA, cuts), lambda share: shares.append(share) or share)
    total = torch.stack(shares).sum(dim=0)
    found = [penalty.grad(pieces(THETA, cuts), lambda _: total) for penalty, cuts in zip(parts, places, strict=True)]
    torch.testing.assert_close(torch.cat([part for grads, _ in found for part in grads]), whole[0])
    assert [one.item() for _, one in found] == pytest.approx([value.item()] * 3)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_pulls_where_one_task_left_the_weights(kind: PenaltyName) -> None:
    """Exactly nothing, in fp32: the weights of a task are large beside what a step changes."""
    anchor = THETA.float() * 100
    penalty = build_penalty_of_one(kind, anchor)
    gradients, value = penalty.grad([anchor.clone()], lambda share: share)
    assert not gradients[0].any() and value == 0


def build_penalty_of_one(kind: PenaltyName, anchor: Tensor) -> Penalty:
    config = Config()
    config.method.penalty = kind
    penalty = build_penalty(config)
    assert penalty is not None
    penalty.remember(Memory([anchor], [FISHERS[0].float()], 2.0))
    return penalty


def test_a_small_step_is_seen_beside_large_weights() -> None:
    """mu . (theta - theta_k) of a step of 1e-6 with weights of 1: fp32 sums of the two would drown it."""
    generator = torch.Generator().manual_seed(1)
    mu, anchor = torch.randn(20000, generator=generator), torch.randn(20000, generator=generator)
    theta = anchor + 1e-6 * mu
    config = Config()
    config.method.penalty, config.method.penalty_weight = PenaltyName.rank1_ewc, 1.0
    penalty = build_penalty(config)
    assert penalty is not None
    penalty.remember(Memory([anchor], [mu], 1.0))
    gradients, _ = penalty.grad([theta], lambda share: share)
    distance = mu.double() @ (theta.double() - anchor.double())
    torch.testing.assert_close(gradients[0], (distance * mu.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["l2", "ewc", "rank1_ewc"])
def test_a_penalty_is_also_a_method(name: str) -> None:
    alone, beside = Config(), Config()
    alone.method.name = MethodName(name)
    beside.method.name, beside.method.penalty = MethodName.finetune, PenaltyName(name)
    assert alone.penalty is beside.penalty is PenaltyName(name)
    assert type(build_penalty(alone)) is type(build_penalty(beside))
    assert build_penalty(Config()) is None


def samples() -> list[Tensor]:
    """Gradients of 40 samples, nearly along one direction."""
    return [draw(100) * (1 + 0.1 * seed) + 0.2 * draw(200 + seed) for seed in range(40)]


@pytest.mark.parametrize("ranks", [1, 3])
def test_the_diagonal_is_the_mean_of_squares(ranks: int) -> None:
    fisher, scale = estimated(PenaltyName.ewc, ranks)
    expected = np.mean([sample.numpy() ** 2 for sample in samples()], axis=0)
    np.testing.assert_allclose(fisher.numpy(), expected, rtol=1e-12)
    assert scale == 1.0


@pytest.mark.parametrize("ranks", [1, 3])
def test_rank_one_agrees_with_the_full_fisher_along_mu(ranks: int) -> None:
    mu, scale = estimated(PenaltyName.rank1_ewc, ranks)
    rows = np.stack([sample.numpy() for sample in samples()])
    full = rows.T @ rows / len(rows)  # E[g g^T]
    np.testing.assert_allclose(mu.numpy(), rows.mean(axis=0), rtol=1e-12)
    approximation = scale * np.outer(mu, mu)
    assert mu.numpy() @ approximation @ mu.numpy() == pytest.approx(mu.numpy() @ full @ mu.numpy(), rel=1e-12)


def test_rank_one_of_no_gradient_holds_nothing() -> None:
    penalty = build(PenaltyName.rank1_ewc, [0, SIZE])
    mu, scale = penalty.estimate(lambda: [[torch.zeros(5)]] * 2, [torch.zeros(5)], 2, lambda share: share)
    assert not mu[0].any() and scale == 0.0


def estimated(kind: PenaltyName, ranks: int) -> tuple[Tensor, float]:
    """As so many ranks find it together, each with a share of the samples; the sums of the others are written down in
    as many rounds as there are sums."""
    penalty, cut = build(kind, [0, SIZE]), [0, 17, SIZE]
    shares = [[pieces(sample, cut) for sample in samples()[rank::ranks]] for rank in range(ranks)]
    known = list[Tensor]()  # totals so far
    while True:
        asked = list[list[Tensor]]()
        for share in shares:
            log = list[Tensor]()

            def total(part: Tensor, log: list[Tensor] = log) -> Tensor:
                log.append(part.clone())
                return known[len(log) - 1].clone() if len(log) <= len(known) else part

            weights = [torch.zeros_like(piece) for piece in share[0]]
            fisher, scale = penalty.estimate(lambda share=share: share, weights, len(samples()), total)
            asked.append(log)
        if len(known) == len(asked[0]):
            return torch.cat(fisher), scale
        known.append(torch.stack([log[len(known)] for log in asked]).sum(dim=0))
