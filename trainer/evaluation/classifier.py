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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from trainer.data.shards import read_index, task_directory, write_atomic
from trainer.errors import UserError
from trainer.evaluation.features import Float32, LabelledImages

WEIGHTS_NAME = "classifier.safetensors"
CARD_NAME = "classifier.json"
VERSION = 1  # of the recipe below: part of the id, so a changed recipe trains again
BATCH = 512  # images judged at once
Report = Callable[[int, int, float], None]  # epoch, epochs, mean training loss


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


class SmallNet(nn.Module):
    """Three levels of convolutions, then the mean over positions: for 8x8 to 64x64 images, a few MFLOP each.

    Levels are halved down to about 4x4; inputs of 32 pixels and more are halved by the first convolution already.
    """

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        halvings = max(0, round(math.log2(image_size / 4)))
        stride = min(2 ** max(0, halvings - 2), 4)
        self.width = 64 if image_size <= 16 else 128
        widths = (32, 32, 64, self.width)
        layers = _convolution(channels, widths[0], 3 if stride == 1 else 5, stride)
        for level, (before, after) in enumerate(pairwise(widths)):
            layers += _convolution(before, after, 3, 1)
            if level < min(halvings, 2):
                layers.append(nn.MaxPool2d(2))
        self.trunk = nn.Sequential(*layers)
        self.head = nn.Linear(self.width, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features (n, width) of images (n, C, H, W) in [-1, 1]."""
        return self.trunk(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class ResNet(nn.Module):
    """torchvision's ResNet-18 with the stem for small images: 3x3, no pooling (He et al. 2016, section 4.2)."""

    def __init__(self, image_size: int, channels: int, classes: int) -> None:
        super().__init__()
        from torchvision.models import resnet18

        self.trunk = resnet18(weights=None)
        stride = 1 if image_size <= 32 else 2
        self.trunk.conv1 = nn.Conv2d(channels, 64, 3, stride, 1, bias=False)
        self.trunk.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.trunk.fc = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
        self.head = nn.Linear(512, classes)

    def embed(self, x: Tensor) -> Tensor:
        """Features (n, 512) of images (n, C, H, W) in [-1, 1]."""
        return self.trunk(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


class Classifier:
    """A trained classifier as feature extractor; `classes[k]` is the class id of output k."""

    name = "classifier"

    def __init__(self, network: SmallNet | ResNet, card: dict[str, Any], device: torch.device) -> None:
        self.id = f"classifier-{card['id']}-{card['sha256'][:8]}"
        self.classes: tuple[int, ...] = tuple(card["settings"]["classes"])
        self.test_accuracy: float = card["test_accuracy"]
        self.seconds: float = card["seconds"]
        self._network = network.to(device).eval()
        self._device = device

    def features(self, images: NDArray[np.uint8]) -> Float32:
        """Features (n, d) of images (n, C, H, W)."""
        return self._map(images, self._network.embed)

    def probabilities(self, images: NDArray[np.uint8]) -> Float32:
        """Class probabilities (n, K), columns in the order of `classes`."""
        return self._map(images, lambda x: self._network(x).softmax(dim=1))

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """The likeliest class id of each image, shape (n,)."""
        return np.asarray(self.classes, dtype=np.int64)[self.probabilities(images).argmax(axis=1)]

    @torch.no_grad()
    def _map(self, images: NDArray[np.uint8], function: Callable[[Tensor], Tensor]) -> Float32:
        parts = [
            function(_normalise(torch.from_numpy(images[i : i + BATCH]).to(self._device))).float().cpu().numpy()
            for i in range(0, len(images), BATCH)
        ]
        assert parts, "no images to classify"
        return np.concatenate(parts)


def classifier_settings(
    root: Path, tasks: Sequence[Sequence[int]], *, epochs: int, seed: int, flip: bool, device: torch.device
) -> ClassifierSettings:
    """The settings for a built data set (`tasks`: class ids of each task, from task 1).

    ResNet-18 for colour images of 32 pixels and more where there is a GPU, else the small network: on CPU cores the
    large one takes hours. The choice is part of the id, so the numbers of the two are never mixed.

    Raises:
        UserError: an index that is missing or unreadable.
    """
    indices = [read_index(task_directory(root, "train", number)) for number in range(1, len(tasks) + 1)]
    count, first = sum(index.count for index in indices), indices[0]
    large = first.image_size >= 32 and first.channels == 3 and device.type == "cuda"
    return ClassifierSettings(
        architecture="resnet18" if large else "cnn",
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
) -> SmallNet | ResNet:
    """Train from scratch: AdamW, one-cycle learning rate (Smith and Topin 2019), shifts of up to 1/8 and flips.

    Every image is held in memory as uint8. Given the seed, device kind and thread count the result is the same; the
    process's own random generators are left as they were.
    """
    images, labels = train.read(np.arange(len(train), dtype=np.int64)), _outputs(settings, train.labels)
    order = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(settings.seed)
        network = _channels_last(_build(settings).to(device)).train()
        steps = math.ceil(len(images) / settings.batch)
        optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps * settings.epochs)
        for epoch in range(settings.epochs):
            total = torch.zeros((), device=device)
            for chosen in np.array_split(order.permutation(len(images)), steps):
                x = _augment(images[chosen], order, settings.flip)
                y = torch.from_numpy(labels[chosen]).to(device)
                x = _normalise(torch.from_numpy(x).to(device)).contiguous(memory_format=torch.channels_last)
                loss = cross_entropy(network(x), y)
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
                optimiser.step()
                schedule.step()
                total += loss.detach()
            if report:
                report(epoch + 1, settings.epochs, total.item() / steps)
    return network.eval()


def _build(settings: ClassifierSettings) -> SmallNet | ResNet:
    kind = ResNet if settings.architecture == "resnet18" else SmallNet
    return kind(settings.image_size, settings.channels, len(settings.classes))


def _channels_last(network: SmallNet | ResNet) -> SmallNet | ResNet:
    """The layout in which convolutions of few channels are fastest, on CPU by several times."""
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def _convolution(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def _normalise(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0


def _outputs(settings: ClassifierSettings, labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class ids -> output numbers."""
    positions = {label: k for k, label in enumerate(settings.classes)}
    return np.fromiter((positions[int(label)] for label in labels), dtype=np.int64, count=len(labels))


def _augment(images: NDArray[np.uint8], generator: np.random.Generator, flip: bool) -> NDArray[np.uint8]:
    """Shift each image by up to an eighth of its size (the border is repeated); flip it where the data allow."""
    size, count = images.shape[-1], len(images)
    reach = max(1, size // 8)
    padded = pad(torch.from_numpy(images).float(), (reach,) * 4, mode="replicate").to(torch.uint8).numpy()
    windows = np.lib.stride_tricks.sliding_window_view(padded, images.shape[-2:], axis=(2, 3))
    down, right = generator.integers(0, 2 * reach + 1, (2, count))
    shifted = windows[np.arange(count), :, down, right]
    if flip:
        mirrored = generator.random(count) < 0.5
        shifted[mirrored] = shifted[mirrored, :, :, ::-1]
    return shifted


def _accuracy(
    network: SmallNet | ResNet, settings: ClassifierSettings, test: LabelledImages, device: torch.device
) -> float:
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
        return Classifier(_channels_last(network), card, device)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path}: not the classifier of {CARD_NAME} ({error}): delete {place} to train again") from None
