"""Each method's loss against its equation, written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from trainer.config import Config, DiffusionConfig, MethodConfig, MethodName, OwnClassifier, Prediction
from trainer.data.batch import Examples
from trainer.diffusion.schedules import make_schedule
from trainer.methods import Rehearsal, Weights, build_method, task_weights
from trainer.settings import load_config


def examples(seed: int, count: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 1, 4, 4)
    return Examples(
        x=torch.randn(shape, generator=generator),
        t=torch.randint(0, 1000, (count,), generator=generator),
        target=torch.randn(shape, generator=generator),
        label=torch.randint(0, 10, (count,), generator=generator),
    )


def config_of(name: MethodName, **settings: float) -> Config:
    config = Config(method=MethodConfig(name, **settings))
    if name is MethodName.jdcl:
        config.model.classifier, config.model.conditional = OwnClassifier.joint, False
    return config


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
        ("lwf", 4, a / 4 + 0.75 * 0.7 * b),
        ("gaussian_distillation", 4, a / 4 + 0.75 * 0.7 * b),
        ("partial_generation", 4, a / 4 + 0.75 * 0.7 * b),
        ("ewc", 3, a),
        ("generative_distillation", 2, a / 2 + 0.5 * 0.7 * b),
        ("generative_distillation", 1, a),
    ],
)
def test_loss_is_the_equation(name: str, task: int, expected: float) -> None:
    method = build_method(config_of(MethodName(name), distillation_weight=0.7, rehearsal_coefficient=0.3))
    terms = method.loss(predict, CURRENT, REPLAY, Weights(1 / task))
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["current"].item() == pytest.approx(a, rel=1e-5)


def test_step_without_replay_keeps_its_share() -> None:
    method = build_method(config_of(MethodName.generative_distillation))
    assert method.loss(predict, CURRENT, None, Weights(1 / 4))["loss"].item() == pytest.approx(a / 4, rel=1e-5)


UNEQUAL = ["data.tasks=[[0,1,2,3,4],[5],[6,7]]", "run.name=a"]


def test_the_share_of_the_current_task() -> None:
    by_tasks, by_classes = load_config("digits", UNEQUAL), load_config("digits", [*UNEQUAL, "method.share=classes"])
    schedule = make_schedule(DiffusionConfig())
    assert [task_weights(by_tasks, task, schedule).share for task in (1, 2, 3)] == [1.0, 1 / 2, 1 / 3]
    assert [task_weights(by_classes, task, schedule).share for task in (1, 2, 3)] == [1.0, 1 / 6, 2 / 8]


@pytest.mark.parametrize("prediction", list(Prediction))
def test_min_snr_weights_are_those_of_diffusers(prediction: Prediction) -> None:
    """As diffusers' training examples write them, from its `compute_snr`."""
    config = load_config("digits", ["method.min_snr=5", f"diffusion.prediction={prediction.value}", "run.name=a"])
    weights = task_weights(config, 2, make_schedule(config.diffusion)).by_timestep
    snr = compute_snr(DDPMScheduler(1000), torch.arange(1000)).double()
    expected = torch.minimum(snr, torch.tensor(5.0)) / (snr + 1 if prediction is Prediction.v else snr)
    assert weights is not None
    torch.testing.assert_close(weights.double(), expected, rtol=1e-3, atol=0)  # their alpha_bar is a product in fp32
    assert weights.min() < 1e-3 and weights.max() <= 1


def test_weighted_timesteps_in_the_loss() -> None:
    weights = Weights(1 / 4, torch.linspace(2.0, 0.5, 1000))
    method = build_method(config_of(MethodName.generative_distillation, distillation_weight=0.7))
    terms = method.loss(predict, CURRENT, REPLAY, weights)
    expected = 0.0
    for batch, factor in ((CURRENT, 1 / 4), (REPLAY, 3 / 4 * 0.7)):
        single = [reference(one(batch, row)) * (2.0 - 1.5 * int(batch.t[row]) / 999) for row in range(len(batch))]
        expected += factor * float(np.mean(single))
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert (terms["current"].item(), terms["replay"].item()) == (pytest.approx(a, rel=1e-5), pytest.approx(b, rel=1e-5))


def one(batch: Examples, row: int) -> Examples:
    rows = slice(row, row + 1)
    return Examples(batch.x[rows], batch.t[rows], batch.target[rows], batch.label[rows])


def test_gradient_reaches_only_the_student() -> None:
    weight = torch.ones(1, requires_grad=True)
    method = build_method(config_of(MethodName.generative_distillation))
    terms = method.loss(lambda x, t, label: weight * x, CURRENT, REPLAY, Weights(1 / 2))
    terms["loss"].backward()
    x, y = CURRENT.x.double(), REPLAY.x.double()
    by_hand = (x - CURRENT.target).mul(x).mean() + (y - REPLAY.target).mul(y).mean()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_what_each_method_is_fed() -> None:
    fed = {name: build_method(config_of(name)) for name in MethodName}
    assert fed[MethodName.generative_distillation].rehearsal is Rehearsal.teacher
    assert fed[MethodName.generative_replay].rehearsal is Rehearsal.noise
    assert fed[MethodName.experience_replay].rehearsal is Rehearsal.buffer
    for name in ("lwf", "gaussian_distillation", "partial_generation", "jdcl"):
        assert fed[MethodName(name)].rehearsal is Rehearsal.teacher
    for name in ("l2", "ewc", "rank1_ewc"):
        assert fed[MethodName(name)].rehearsal is Rehearsal.none
    assert [name.value for name, method in fed.items() if method.all_tasks] == ["joint"]
