"""Each method's loss against its equation, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import MethodConfig, MethodName
from trainer.data.batch import Examples
from trainer.methods import Rehearsal, build_method


def examples(seed: int, count: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 4, 4)
    return Examples(
        x=torch.randn(shape, generator=generator),
        t=torch.randint(0, 1000, (count,), generator=generator),
        target=torch.randn(shape, generator=generator),
        label=torch.randint(0, 10, (count,), generator=generator),
    )


def predict(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    return 0.5 * x + t.view(-1, 1, 1, 1) / 1000 - label.view(-1, 1, 1, 1)


def reference(batch: Examples) -> float:
    x, t, target, label = (a.numpy().astype(np.float64) for a in (batch.x, batch.t, batch.target, batch.label))
    error = 0.5 * x + t.reshape(-1, 1, 1, 1) / 1000 - label.reshape(-1, 1, 1, 1) - target
    return float(np.mean(error**2))


CURRENT, REPLAY = examples(0, 6), examples(1, 3)
a, b = reference(CURRENT), reference(REPLAY)


@pytest.mark.parametrize(
    ("name", "task", "expected"),
    [
        ("finetune", 3, a),
        ("joint", 3, a),
        ("experience_replay", 3, a + 0.3 * b),
        ("generative_replay", 4, a / 4 + 0.75 * 0.7 * b),
        ("generative_distillation", 4, a / 4 + 0.75 * 0.7 * b),
        ("generative_distillation", 2, a / 2 + 0.5 * 0.7 * b),
        ("generative_distillation", 1, a),
    ],
)
def test_loss_is_the_equation(name: str, task: int, expected: float) -> None:
    method = build_method(MethodConfig(MethodName(name), distillation_weight=0.7, rehearsal_coefficient=0.3))
    terms = method.loss(predict, CURRENT, REPLAY, task)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["current"].item() == pytest.approx(a, rel=1e-5)


def test_step_without_replay_keeps_its_share() -> None:
    method = build_method(MethodConfig(MethodName.generative_distillation))
    assert method.loss(predict, CURRENT, None, 4)["loss"].item() == pytest.approx(a / 4, rel=1e-5)


def test_gradient_reaches_only_the_student() -> None:
    weight = torch.ones(1, requires_grad=True)
    method = build_method(MethodConfig(MethodName.generative_distillation))
    terms = method.loss(lambda x, t, label: weight * x, CURRENT, REPLAY, 2)
    terms["loss"].backward()
    x, y = CURRENT.x.double(), REPLAY.x.double()
    by_hand = (x - CURRENT.target).mul(x).mean() + (y - REPLAY.target).mul(y).mean()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_what_each_method_is_fed() -> None:
    fed = {name: build_method(MethodConfig(name)) for name in MethodName}
    assert fed[MethodName.generative_distillation].rehearsal is Rehearsal.teacher
    assert fed[MethodName.generative_replay].rehearsal is Rehearsal.noise
    assert fed[MethodName.experience_replay].rehearsal is Rehearsal.buffer
    assert [name.value for name, method in fed.items() if method.all_tasks] == ["joint"]
