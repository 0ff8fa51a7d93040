"""The project's own classifier of a data set: trained once, cached, the judge of what is generated.

Gives class predictions (for the class mix and the accuracy) and the features of its last layer (for the Frechet
distance). Trained on the train shards of every task of the configuration, so that its judgement does not change as
tasks are learnt.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.data.shards import read_index, task_directory, write_atomic
from trainer.errors import UserError
from trainer.evaluation.features import Float32, LabelledImages
from trainer.evaluation.networks import (
    Network,
    Report,
    build_network,
    channels_last,
    choose_architecture,
    descend,
    mapped,
    output_numbers,
    training_input,
)

WEIGHTS_NAME = "classifier.safetensors"
CARD_NAME = "classifier.json"
VERSION = 1  # of the recipe, here and in `networks`: part of the id, so a changed recipe trains again
PEAK_LR = 4e-3


@dataclass(frozen=True)
class ClassifierSettings:
    """All that decides which classifier is trained; hashed into its id.

    `shards` are the sha256 of the train shards, in order; `classes` the class ids in the order of the outputs.
    """

    architecture: str  # cnn or resnet18
    image_size: int
    channels: int
    classes: tuple[int, ...]
    epochs: int
    batch: int
    seed: int
    flip: bool
    shards: tuple[str, ...] = field(repr=False)
    version: int = VERSION

    @property
    def id(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


class Classifier:
    """A trained classifier as feature extractor; `classes[k]` is the class id of output k."""

    name = "classifier"

    def __init__(self, network: Network, card: dict[str, Any], device: torch.device) -> None:
        self.id = f"classifier-{card['id']}-{card['sha256'][:8]}"
        self.classes: tuple[int, ...] = tuple(card["settings"]["classes"])
        self.test_accuracy: float = card["test_accuracy"]
        self.seconds: float = card["seconds"]
        self._network = network.to(device).eval()
        self._device = device

    def features(self, images: NDArray[np.uint8]) -> Float32:
        """Features (n, d) of images (n, C, H, W)."""
        return mapped(self._network.embed, images, self._device)

    def probabilities(self, images: NDArray[np.uint8]) -> Float32:
        """Class probabilities (n, K), columns in the order of `classes`."""
        return mapped(lambda x: self._network(x).softmax(dim=1), images, self._device)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The likeliest class id of each image, shape (n,)."""
        return np.asarray(self.classes, dtype=np.int64)[self.probabilities(images).argmax(axis=1)]


def classifier_settings(
    root: Path, tasks: Sequence[Sequence[int]], *, epochs: int, seed: int, flip: bool, device: torch.device
) -> ClassifierSettings:
    """The settings for a built data set (`tasks`: class ids of each task, from task 1).

    The architecture depends on the device; it is part of the id, so the numbers of the two are never mixed.

    Raises:
        UserError: an index that is missing or unreadable.
    """
    indices = [read_index(task_directory(root, "train", number)) for number in range(1, len(tasks) + 1)]
    count, first = sum(index.count for index in indices), indices[0]
    return ClassifierSettings(
        architecture=choose_architecture(first.image_size, first.channels, device),
        image_size=first.image_size,
        channels=first.channels,
        classes=tuple(sorted(label for task in tasks for label in task)),
        epochs=epochs,
        batch=32 if count < 10_000 else 128,
        seed=seed,
        flip=flip,
        shards=tuple(shard.sha256 for index in indices for shard in index.shards),
    )


def load_or_train(
    directory: Path,
    settings: ClassifierSettings,
    open_split: Callable[[str], LabelledImages],
    device: torch.device,
    report: Report | None = None,
) -> Classifier:
    """The classifier cached under `<directory>/<id>/`, trained first where it is not there. For one process only.

    Args:
        directory: `<data root>/evaluator`.
        open_split: gives the images of "train" and "test"; called only where training is needed.
        report: called after each epoch.

    Raises:
        UserError: a cached file that does not match its card.
    """
    place = directory / settings.id
    if not (place / CARD_NAME).is_file():
        started = time.monotonic()
        train, test = open_split("train"), open_split("test")
        network = train_classifier(settings, train, device, report)
        card = {
            "id": settings.id,
            "settings": asdict(settings),
            "test_accuracy": round(_accuracy(network, settings, test, device), 6),
            "train_images": len(train),
            "seconds": round(time.monotonic() - started, 2),
        }
        _publish(place, network, card)
    return _load(place, settings, device)


def train_classifier(
    settings: ClassifierSettings, train: LabelledImages, device: torch.device, report: Report | None = None
) -> Network:
    """Train from scratch: cross-entropy (`networks.descend`), shifts of up to 1/8 and flips.

    Every image is held in memory as uint8. Given the seed, device kind and thread count the result is the same; the
    process's own random generators are left as they were.
    """
    images, labels = train.read(np.arange(len(train), dtype=np.int64)), output_numbers(settings.classes, train.labels)
    order = np.random.default_rng(settings.seed)
    steps = math.ceil(len(images) / settings.batch)

    def epoch_losses() -> Iterator[Tensor]:
        for chosen in np.array_split(order.permutation(len(images)), steps):
            x = training_input(images[chosen], order, settings.flip, device)
            yield cross_entropy(network(x), torch.from_numpy(labels[chosen]).to(device))

    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        network = channels_last(_build(settings).to(device))
        return descend(network, epoch_losses, epochs=settings.epochs, steps=steps, lr=PEAK_LR, report=report)


def _build(settings: ClassifierSettings) -> Network:
    return build_network(settings.architecture, settings.image_size, settings.channels, len(settings.classes))


def _accuracy(network: Network, settings: ClassifierSettings, test: LabelledImages, device: torch.device) -> float:
    card = {"id": "", "sha256": "", "settings": asdict(settings), "test_accuracy": 0.0, "seconds": 0.0}
    predicted = Classifier(network, card, device).predict(test.read(np.arange(len(test), dtype=np.int64)))
    return float(np.mean(predicted == test.labels))


def _publish(place: Path, network: nn.Module, card: dict[str, Any]) -> None:
    """Written beside, then renamed; where another process was first, its classifier stays."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    data = save_safetensors(weights)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        write_atomic(temporary / WEIGHTS_NAME, data)
        text = json.dumps(card | {"sha256": hashlib.sha256(data).hexdigest()}, indent=1)
        write_atomic(temporary / CARD_NAME, text.encode())
        try:
            temporary.rename(place)
        except OSError:
            if not (place / CARD_NAME).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _load(place: Path, settings: ClassifierSettings, device: torch.device) -> Classifier:
    path = place / WEIGHTS_NAME
    try:
        card = json.loads((place / CARD_NAME).read_bytes())
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != card["sha256"]:
            raise ValueError("sha256 does not match")
        network = _build(settings)
        network.load_state_dict(load_safetensors(data))
        return Classifier(channels_last(network), card, device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not the classifier of {CARD_NAME} ({error}): delete {place} to train again") from None
