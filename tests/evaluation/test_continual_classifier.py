"""A classifier that learns task by task: its loss against closed forms, its outputs, what replay is good for."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from tests.evaluation.conftest import CPU, TASKS, Digits
from trainer.data.dataset import TaskData
from trainer.evaluation.continual_classifier import (
    Lesson,
    Recipe,
    Replay,
    _in_turn,
    accuracy_row,
    classify,
    distillation_loss,
    learn_task,
)
from trainer.evaluation.networks import Network, build_network

RECIPE = Recipe(epochs=4, batch=64, lr=4e-3, temperature=2.0, flip=False, seed=3)
ONE_STEP = Recipe(epochs=1, batch=40, lr=1e-3, temperature=2.0, flip=True, seed=5)
BOTH = [*TASKS[0], *TASKS[1]]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits)
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("known", [3, 5])
def test_distillation_is_its_closed_form(known: int) -> None:
    """Value and gradient, (T / n) (softmax(new / T) - target), with classes that the old one does not know and none."""
    generator = np.random.default_rng(0)
    new, old, temperature = generator.normal(size=(7, 5)), generator.normal(size=(7, known)), 2.0
    target = np.zeros((7, 5))
    target[:, :known] = softmax(old / temperature)
    probability = softmax(new / temperature)
    logits = torch.tensor(new, requires_grad=True)
    loss = distillation_loss(logits, torch.tensor(old), temperature)
    loss.backward()
    own = target[:, :known]
    expected = temperature**2 * (own * np.log(own / probability[:, :known])).sum(axis=1).mean()
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert logits.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), temperature / 7 * (probability - target), rtol=1e-10, atol=1e-14)


def test_nothing_is_to_be_learnt_from_oneself() -> None:
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0.0, abs=1e-12)


def even_images(count: int, seed: int) -> NDArray[np.uint8]:
    """Images of one grey each: no shift or flip changes them."""
    greys = np.random.default_rng(seed).integers(0, 256, (count, 1, 1, 1)).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(greys, (count, 1, 8, 8)))


def inputs(images: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(images).double() / 127.5 - 1.0


@pytest.mark.parametrize("labelled", [False, True])
def test_a_step_weighs_the_task_and_what_is_replayed_by_its_share(labelled: bool) -> None:
    """The loss of a first step in float64, from the same initial weights, labels and soft labels."""
    known = np.tile([4, 7], 20)
    old = learn_task(None, "cnn", Lesson([4, 7], even_images(40, 0), known, None, 1.0), ONE_STEP, CPU)
    images, labels = even_images(30, 1), np.tile([1, 2], 15)
    replayed, classes, losses = even_images(40, 2), [4, 7, 2, 1], list[float]()
    lesson = Lesson(classes, images, labels, Replay(replayed, known if labelled else None), share=0.3)
    learn_task(old, "cnn", lesson, ONE_STEP, CPU, lambda epoch, epochs, loss: losses.append(loss))

    torch.manual_seed(ONE_STEP.seed)
    fresh = build_network("cnn", 8, 1, 4)
    fresh.trunk.load_state_dict(old.trunk.state_dict())
    with torch.no_grad():
        fresh.head.weight[:2], fresh.head.bias[:2] = old.head.weight, old.head.bias
    logits = fresh.double().train()(torch.cat([inputs(images), inputs(replayed)]))
    current = cross_entropy(logits[:30], torch.tensor([classes.index(label) for label in labels]))
    if labelled:
        again = cross_entropy(logits[30:], torch.tensor([classes.index(label) for label in known]))
    else:
        again = distillation_loss(logits[30:], old.double()(inputs(replayed)), 2.0)
    assert losses == [pytest.approx((0.3 * current + 0.7 * again).item(), rel=1e-4)]


@pytest.fixture(scope="module")
def parts(digits: Digits) -> list[tuple[TaskData, TaskData]]:
    """Train and test images of each task."""
    found = list[tuple[TaskData, TaskData]]()
    for classes in TASKS:
        train, test = (digits.open_split(split) for split in ("train", "test"))
        found.append(
            (
                train.subset(np.flatnonzero(np.isin(train.labels, classes))),
                test.subset(np.flatnonzero(np.isin(test.labels, classes))),
            )
        )
    return found


def pixels(data: TaskData) -> NDArray[np.uint8]:
    return data.read(np.arange(len(data)))


@pytest.fixture(scope="module")
def first(parts: list[tuple[TaskData, TaskData]]) -> Network:
    train = parts[0][0]
    return learn_task(None, "cnn", Lesson(TASKS[0], pixels(train), train.labels, None, 1.0), RECIPE, CPU)


def accuracies(network: Network, parts: list[tuple[TaskData, TaskData]]) -> list[float]:
    return [float(np.mean(classify(network, BOTH, pixels(test), CPU) == test.labels)) for _, test in parts]


def second(first: Network, parts: list[tuple[TaskData, TaskData]], replay: Replay | None) -> list[float]:
    """Accuracies on both tasks after the second."""
    train = parts[1][0]
    return accuracies(
        learn_task(first, "cnn", Lesson(BOTH, pixels(train), train.labels, replay, 0.5), RECIPE, CPU), parts
    )


def test_a_class_yet_to_come_is_never_told(first: Network, parts: list[tuple[TaskData, TaskData]]) -> None:
    assert first.head.out_features == 5
    assert set(classify(first, TASKS[0], pixels(parts[1][1]), CPU)) <= set(TASKS[0])
    test = parts[0][1]
    assert np.mean(classify(first, TASKS[0], pixels(test), CPU) == test.labels) > 0.9


def test_finetuning_forgets_and_soft_labels_of_replayed_images_keep(
    first: Network, parts: list[tuple[TaskData, TaskData]]
) -> None:
    """The images that a perfect generator would replay, without their labels."""
    before = {name: value.clone() for name, value in first.state_dict().items()}
    forgotten = second(first, parts, None)
    kept = second(first, parts, Replay(pixels(parts[0][0]), None))
    assert forgotten[0] < 0.1 and forgotten[1] > 0.9
    assert kept[0] > 0.8 and kept[1] > 0.8
    assert all(torch.equal(before[name], value) for name, value in first.state_dict().items()), "the old one is kept"


def test_the_same_seed_makes_the_same_classifier(parts: list[tuple[TaskData, TaskData]]) -> None:
    train = parts[0][0].subset(np.arange(70))
    one = Lesson(TASKS[0], pixels(train), train.labels, None, 1.0)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    runs = [learn_task(None, "cnn", one, ONE_STEP, CPU).state_dict() for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(value, runs[1][name]) for name, value in runs[0].items())


def test_every_replayed_image_comes_as_often() -> None:
    batches = list(islice(_in_turn(np.random.default_rng(0), 6, 4), 6))
    assert [len(batch) for batch in batches] == [4] * 6
    assert Counter(np.concatenate(batches).tolist()) == dict.fromkeys(range(6), 4)
    assert len(next(_in_turn(np.random.default_rng(0), 3, 8))) == 8  # a set smaller than a batch


def test_accuracy_over_all_images_and_of_each_task() -> None:
    told = np.array([1, 2, 3, 3, 5]), np.array([1, 2, 2, 3, 4]), np.array([1, 1, 1, 2, 2])
    row = accuracy_row(*told)
    own = accuracy_row(*told, "model")
    assert (own["model_accuracy"], own["model_images"], own["tasks"][1]["model_accuracy"]) == (0.6, 5, 0.5)
    assert (row["classifier_accuracy"], row["classifier_images"]) == (0.6, 5)
    assert row["tasks"] == [
        {"task": 1, "classifier_accuracy": pytest.approx(2 / 3), "classifier_images": 3},
        {"task": 2, "classifier_accuracy": 0.5, "classifier_images": 2},
    ]
