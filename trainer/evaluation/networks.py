"""Networks that tell classes apart, and how they are trained: the judge's own and the one that learns task by task."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import pad

from trainer.evaluation.features import Float32

BATCH = 512  # images judged at once
Report = Callable[[int, int, float], None]  # epoch, epochs, mean training loss


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


Network = SmallNet | ResNet


def choose_architecture(image_size: int, channels: int, device: torch.device) -> str:
    """ResNet-18 for colour images of 32 pixels and more where there is a GPU, else the small network: on CPU cores the
    large one takes hours."""
    return "resnet18" if image_size >= 32 and channels == 3 and device.type == "cuda" else "cnn"


def build_network(architecture: str, image_size: int, channels: int, classes: int) -> Network:
    """`architecture`: cnn or resnet18."""
    kind = ResNet if architecture == "resnet18" else SmallNet
    return kind(image_size, channels, classes)


def channels_last(network: Network) -> Network:
    """The layout in which convolutions of few channels are fastest, on CPU by several times."""
    return network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def descend(
    network: Network,
    epoch_losses: Callable[[], Iterator[Tensor]],
    *,
    epochs: int,
    steps: int,
    lr: float,
    report: Report | None = None,
) -> Network:
    """AdamW with a one-cycle learning rate (Smith and Topin 2019); gives the network back, in evaluation mode.

    Args:
        epoch_losses: gives the losses, scalars, of the `steps` steps of an epoch, one after the other.
        lr: the largest learning rate.
        report: called after each epoch.
    """
    network.train()
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, lr, total_steps=steps * epochs)
    for epoch in range(epochs):
        total = torch.zeros((), device=network.head.weight.device)
        for loss in epoch_losses():
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.detach()
        if report:
            report(epoch + 1, epochs, total.item() / steps)
    return network.eval()


@torch.no_grad()
def mapped(function: Callable[[Tensor], Tensor], images: NDArray[np.uint8], device: torch.device) -> Float32:
    """What a function of images in [-1, 1] gives of images (n, C, H, W) uint8, a part of them at a time."""
    parts = [
        function(_normalise(torch.from_numpy(images[i : i + BATCH]).to(device))).float().cpu().numpy()
        for i in range(0, len(images), BATCH)
    ]
    assert parts, "no images to classify"
    return np.concatenate(parts)


def output_numbers(classes: Sequence[int], labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Class ids (n,) -> the outputs that stand for them, their positions in `classes`."""
    positions = {label: k for k, label in enumerate(classes)}
    return np.fromiter((positions[int(label)] for label in labels), dtype=np.int64, count=len(labels))


def training_input(
    images: NDArray[np.uint8], generator: np.random.Generator, flip: bool, device: torch.device
) -> Tensor:
    """Augmented images (n, C, H, W) in [-1, 1] on a device."""
    x = torch.from_numpy(augment(images, generator, flip)).to(device)
    return _normalise(x).contiguous(memory_format=torch.channels_last)


def augment(images: NDArray[np.uint8], generator: np.random.Generator, flip: bool) -> NDArray[np.uint8]:
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


def _convolution(before: int, after: int, kernel: int, stride: int) -> list[nn.Module]:
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.ReLU()]


def _normalise(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1.0
