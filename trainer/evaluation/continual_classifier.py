"""The solver of Shin et al. 2017 (arXiv 1705.08690): a classifier that learns the tasks of a run one after another.

With s the share of the current task, x its real images and z replayed ones:

    L = s CE(new(x), y) + (1 - s) T^2 KL(softmax(old(z) / T) || softmax(new(z) / T))

z carry soft labels: what the classifier after the task before ("old") makes of them (van de Ven et al. 2020, Nature
Communications 11, 4069; T = 2 there and in Masip et al. 2024, arXiv 2311.14028). T^2 keeps the size of the gradient
(Hinton et al. 2015, arXiv 1503.02531, section 2). Where z are real images they have labels of their own, and the second
term is the cross-entropy with these: what the old classifier has come to think of them can only be worse.

There is one output for each class known, in the order of learning. A class yet to come has none, so it takes no part in
the softmax and gets no gradient; its row of the last layer is added, with fresh weights, when its task is learnt. Under
the old classifier the new classes have probability 0, as in van de Ven's code: a replayed image is none of them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, pad

from trainer.evaluation.networks import (
    Network,
    Report,
    build_network,
    channels_last,
    descend,
    mapped,
    output_numbers,
    training_input,
)


@dataclass(frozen=True)
class Recipe:
    """How a task is learnt: passes over its images, images of it (and as many replayed) in a step, the largest
    learning rate, T, whether images may be mirrored, and the seed of initial weights, order and augmentation."""

    epochs: int
    batch: int
    lr: float
    temperature: float
    flip: bool
    seed: int


@dataclass(frozen=True)
class Replay:
    """Images (M, C, H, W) uint8 with class ids (M,), or with the old classifier's soft labels where there are none."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None


@dataclass(frozen=True)
class Lesson:
    """What a task is learnt from: its images (N, C, H, W) uint8 and class ids (N,), and what is replayed beside them.

    `classes`: all class ids known after it, in the order of learning. `share`: s, in (0, 1].
    """

    classes: Sequence[int]
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    replay: Replay | None
    share: float


def learn_task(
    old: Network | None,
    architecture: str,
    lesson: Lesson,
    recipe: Recipe,
    device: torch.device,
    report: Report | None = None,
) -> Network:
    """The classifier after a task, in evaluation mode.

    Given the seed, device kind and thread count the result is the same; the process's own random generators are left
    as they were.

    Args:
        old: the classifier after the task before, which is left as it is; None for the first task.
        report: called after each epoch with (epoch, epochs, loss).
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(recipe.seed)
        network = _extended(old, architecture, lesson)
    network = channels_last(network.to(device))
    order = np.random.default_rng(recipe.seed)
    outputs = output_numbers(lesson.classes, lesson.labels)
    rehearsal = None if lesson.replay is None else _Rehearsal(old, lesson.classes, lesson.replay, recipe, order, device)
    steps = math.ceil(len(lesson.images) / recipe.batch)

    def epoch_losses() -> Iterator[Tensor]:
        for chosen in np.array_split(order.permutation(len(lesson.images)), steps):
            x = training_input(lesson.images[chosen], order, recipe.flip, device)
            y = torch.from_numpy(outputs[chosen]).to(device)
            if rehearsal is None:
                yield cross_entropy(network(x), y)
            else:
                logits = network(torch.cat([x, rehearsal.draw()]))
                current, replayed = cross_entropy(logits[: len(x)], y), rehearsal.loss(logits[len(x) :])
                yield lesson.share * current + (1.0 - lesson.share) * replayed

    return descend(network, epoch_losses, epochs=recipe.epochs, steps=steps, lr=recipe.lr, report=report)


def distillation_loss(logits: Tensor, old_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(old / T) || softmax(new / T)), mean over images, a scalar.

    Args:
        logits: of the classifier that learns (n, K).
        old_logits: (n, K'), K' <= K, of the first K' of these classes; the others have probability 0 under it.
    """
    target = pad((old_logits / temperature).softmax(dim=1), (0, logits.shape[1] - old_logits.shape[1]))
    return temperature**2 * kl_div(log_softmax(logits / temperature, dim=1), target, reduction="batchmean")


def classify(
    logits: Callable[[Tensor], Tensor], classes: Sequence[int], images: NDArray[np.uint8], device: torch.device
) -> NDArray[np.int64]:
    """The likeliest class id of each image (n, C, H, W), shape (n,).

    Args:
        logits: of images (n, C, H, W) in [-1, 1], one output for each of `classes`, in their order.
    """
    return np.asarray(classes, dtype=np.int64)[mapped(logits, images, device).argmax(axis=1)]


def accuracy_row(
    predicted: NDArray[np.int64], labels: NDArray[np.int64], tasks: NDArray[np.int64], whose: str = "classifier"
) -> dict[str, Any]:
    """Share of test images whose class is told, as JSON values.

    Args:
        predicted, labels, tasks: class ids told, true class ids, and the task of each image, (n,); tasks from 1 up
            without a gap.
        whose: the prefix of the keys: "classifier", or "model" of a model's own classifier.

    Returns:
        <whose>_accuracy, over all images of the tasks learnt; <whose>_images, their number; the same for each of
        `tasks`.
    """

    def part(chosen: NDArray[np.bool_]) -> dict[str, Any]:
        hits = (predicted == labels)[chosen]
        return {f"{whose}_accuracy": float(hits.mean()), f"{whose}_images": len(hits)}

    every = np.ones(len(labels), dtype=np.bool_)
    return part(every) | {"tasks": [{"task": task, **part(tasks == task)} for task in range(1, int(tasks.max()) + 1)]}


class _Rehearsal:
    """The replayed images of one step after another, and their term of the loss."""

    def __init__(
        self,
        old: Network | None,
        classes: Sequence[int],
        replay: Replay,
        recipe: Recipe,
        order: np.random.Generator,
        device: torch.device,
    ) -> None:
        assert old is not None, "nothing is replayed with the first task"
        self._old = channels_last(copy.deepcopy(old).to(device)).eval()
        self._images, self._recipe, self._order, self._device = replay.images, recipe, order, device
        self._outputs = None if replay.labels is None else output_numbers(classes, replay.labels)
        self._batches = _in_turn(order, len(replay.images), recipe.batch)

    def draw(self) -> Tensor:
        """Those of the next step (n, C, H, W), augmented."""
        self._chosen = next(self._batches)
        self._drawn = training_input(self._images[self._chosen], self._order, self._recipe.flip, self._device)
        return self._drawn

    def loss(self, logits: Tensor) -> Tensor:
        """Of the new classifier's logits (n, K) of the images drawn last."""
        if self._outputs is not None:
            return cross_entropy(logits, torch.from_numpy(self._outputs[self._chosen]).to(self._device))
        with torch.no_grad():
            old_logits = self._old(self._drawn)
        return distillation_loss(logits, old_logits, self._recipe.temperature)


def _extended(old: Network | None, architecture: str, lesson: Lesson) -> Network:
    """A network with an output for each class, on the CPU; weights are the old one's as far as it has them."""
    network = build_network(architecture, lesson.images.shape[-1], lesson.images.shape[1], len(lesson.classes))
    if old is not None:
        places, known = network.state_dict(), old.head.out_features
        for name, value in old.state_dict().items():
            place = places[name]
            (place[:known] if name.startswith("head.") else place).copy_(value)
    return network


def _in_turn(order: np.random.Generator, count: int, size: int) -> Iterator[NDArray[np.int64]]:
    """Batches of `size` of `count` indices, each as often as any other: one random order after another."""
    left = np.empty(0, dtype=np.int64)
    while True:
        while len(left) < size:
            left = np.concatenate([left, order.permutation(count)])
        yield left[:size]
        left = left[size:]
