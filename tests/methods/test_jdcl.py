"""The losses of models that classify, against their equations written out in numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from trainer.config import Config, MethodName, OwnClassifier
from trainer.data.batch import JointExamples
from trainer.methods import Method, Weights, build_method

CLASSES = 5


def joint_examples(seed: int, count: int, *, taught: bool = False, weak: bool = False) -> JointExamples:
    draw = torch.Generator().manual_seed(seed)
    shape = (count, 1, 4, 4)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw)

    return JointExamples(
        x=normal(*shape),
        t=torch.randint(0, 1000, (count,), generator=draw),
        target=normal(*shape),
        label=torch.randint(0, CLASSES, (count,), generator=draw),
        view=normal(*shape),
        known=torch.arange(count) % 3 != 1,
        weak=4 * normal(*shape) if weak else None,
        noise=normal(*shape) if taught else None,
        logits=normal(count, CLASSES) if taught else None,
    )


def predict(x: Tensor, t: Tensor, label: Tensor, view: Tensor) -> tuple[Tensor, Tensor]:
    """A model whose logits are the first pixels of a view."""
    return 0.5 * x + t.view(-1, 1, 1, 1) / 1000, view.flatten(1)[:, :CLASSES]


def error(batch: JointExamples, target: Tensor) -> float:
    x, t, wanted = (part.double().numpy() for part in (batch.x, batch.t, target))
    return float(np.mean((0.5 * x + t.reshape(-1, 1, 1, 1) / 1000 - wanted) ** 2))


def log_softmax(logits: Tensor) -> np.ndarray:
    numbers = logits.flatten(1)[:, :CLASSES].double().numpy()
    return numbers - np.log(np.exp(numbers).sum(axis=1, keepdims=True))


def entropies(view: Tensor, label: Tensor) -> np.ndarray:
    return -log_softmax(view)[np.arange(len(label)), label.numpy()]


def method_of(name: MethodName = MethodName.jdcl, labelled: float = 1.0, **jdcl: float | bool) -> Method:
    config = Config()
    config.data.labelled = labelled
    config.model.classifier, config.model.conditional = OwnClassifier.joint, False
    config.method.name = name
    for key, value in jdcl.items():
        assert hasattr(config.jdcl, key)
        setattr(config.jdcl, key, value)
    return build_method(config)


@pytest.mark.parametrize("name", [MethodName.jdcl, MethodName.finetune, MethodName.joint])
def test_real_images_teach_to_denoise_and_where_they_have_labels_to_classify(name: MethodName) -> None:
    batch = joint_examples(0, 7)
    terms = method_of(name, labelled=5 / 7, classification_weight=0.3).loss(predict, batch, None, Weights())
    told = entropies(batch.view, batch.label)[batch.known.numpy()].mean()
    assert batch.known.sum() == 5
    assert terms["loss"].item() == pytest.approx(error(batch, batch.target) + 0.3 * told, rel=1e-5)
    assert terms["classification"].item() == pytest.approx(told, rel=1e-5)


def test_a_batch_without_labels_teaches_to_denoise_alone() -> None:
    batch = replace(joint_examples(0, 4), known=torch.zeros(4, dtype=torch.bool))
    terms = method_of().loss(predict, batch, None, Weights())
    assert terms["loss"].item() == pytest.approx(error(batch, batch.target), rel=1e-5)


def test_sure_guesses_at_weak_views_stand_in_for_missing_labels() -> None:
    batch = joint_examples(1, 30, weak=True)
    method = method_of(labelled=2 / 3, classification_weight=0.3, fixmatch_weight=0.7, fixmatch_threshold=0.8)
    assert batch.weak is not None
    certainty = np.exp(log_softmax(batch.weak))
    unlabelled = ~batch.known.numpy()
    taken = unlabelled & (certainty.max(axis=1) >= 0.8)
    assert 0 < taken.sum() < unlabelled.sum()
    guesses = torch.from_numpy(certainty.argmax(axis=1))
    guessed = (entropies(batch.view, guesses) * taken).sum() / unlabelled.sum()
    told = entropies(batch.view, batch.label)[batch.known.numpy()].mean()
    terms = method.loss(predict, batch, None, Weights())
    expected = error(batch, batch.target) + 0.3 * told + 0.7 * guessed
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["fixmatch_taken"].item() == pytest.approx(taken.sum() / unlabelled.sum())


def test_the_loss_is_the_same_however_a_batch_is_cut() -> None:
    batch = joint_examples(8, 12, weak=True)
    method = method_of(labelled=0.5, fixmatch_threshold=0.3)
    whole = method.loss(predict, batch, None, Weights())
    parts = [method.loss(predict, batch.rows(slice(row, row + 1)), None, Weights()) for row in range(12)]
    for name in ("loss", "classification", "fixmatch", "fixmatch_taken"):
        assert whole[name].item() == pytest.approx(np.mean([part[name].item() for part in parts]), rel=1e-5)


def test_guesses_get_no_gradient_through_the_weak_views() -> None:
    batch = joint_examples(1, 9, weak=True)
    assert batch.weak is not None
    for views in (batch.view, batch.weak):
        views.requires_grad_(True)
    method_of(labelled=0.5, fixmatch_threshold=0.5).loss(predict, batch, None, Weights())["loss"].backward()
    assert batch.view.grad is not None and batch.view.grad.any()
    assert batch.weak.grad is None or not batch.weak.grad.any()


@pytest.mark.parametrize("classifying", [1.0, 0.0])
def test_the_global_stage_is_the_equation(classifying: float) -> None:
    z = joint_examples(2, 6, taught=True)
    method = method_of(noise_weight=0.2, label_weight=0.05, logit_weight=0.4)
    assert z.noise is not None and z.logits is not None
    labels = entropies(z.view, z.label).mean()
    soft = -(np.exp(log_softmax(z.logits)) * log_softmax(z.view)).sum(axis=1).mean()
    denoised = 0.2 * error(z, z.noise) + 2 * error(z, z.target)
    terms = method.loss(predict, z, None, Weights(classifying=classifying))
    expected = denoised + classifying * (0.05 * labels + 2 * 0.4 * soft)
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert terms["logits"].item() == pytest.approx(soft, rel=1e-5)


def test_two_teachers_with_their_shares_are_the_mean_over_the_batch() -> None:
    """The paper writes 2 B_old/B and 2 B_new/B before the mean over each teacher's images."""
    z = joint_examples(3, 8, taught=True)
    parts = [z.rows(slice(0, 5)), z.rows(slice(5, 8))]
    weights = {"noise_weight": 0.0, "label_weight": 0.0, "logit_weight": 0.0}
    whole = method_of(**weights).loss(predict, z, None, Weights())["loss"].item()
    assert whole == pytest.approx(sum(2 * len(part) / 8 * error(part, part.target) for part in parts), rel=1e-5)


def test_without_distillation_images_of_teachers_are_learnt_like_real_ones() -> None:
    z = joint_examples(4, 6, taught=True)
    assert z.noise is not None
    method = method_of(distil=False, classification_weight=0.3)
    terms = method.loss(predict, z, None, Weights())
    expected = error(z, z.noise) + 0.3 * entropies(z.view, z.label).mean()
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert "logits" not in terms


def test_real_images_that_go_on_weigh_as_their_share() -> None:
    z, real = joint_examples(5, 6, taught=True), joint_examples(6, 4)
    method = method_of()
    alone, beside = (method.loss(predict, z, part, Weights(share=0.25)) for part in (None, real))
    own = method.loss(predict, real, None, Weights())
    assert beside["loss"].item() == pytest.approx(alone["loss"].item() + 0.25 * own["loss"].item(), rel=1e-5)
    assert beside["real_current"].item() == own["current"].item()


def test_rows_cut_all_of_an_example() -> None:
    part = joint_examples(7, 6, taught=True).rows(slice(2, 5))
    assert isinstance(part, JointExamples) and part.weak is None
    assert part.logits is not None and part.noise is not None
    assert {len(value) for value in (part.x, part.view, part.known, part.noise, part.logits, part.label)} == {3}
