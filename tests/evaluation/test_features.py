"""Inception and DINOv2: small stand-in weights through the real libraries, and no network at any time."""

from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from trainer.config import Extractor
from trainer.errors import UserError
from trainer.evaluation.features import (
    INCEPTION_FILE,
    DinoFeatures,
    InceptionFeatures,
    check_weights,
    dinov2_directory,
    inception_directory,
)
from trainer.evaluation.frechet import frechet_of_features

CPU = torch.device("cpu")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 1, 16, 16), dtype=np.uint8)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


class PooledChannels(nn.Module):
    """2,048 features: the mean of each channel, repeated."""

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean(dim=(2, 3))
        return torch.cat([means] * 682 + [means[:, :2]], dim=1)


class FakeInception(nn.Module):
    """What clean-fid uses of its TorchScript file: `.layers`."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = PooledChannels()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.fixture
def inception_file(tmp_path: Path) -> Path:
    path = tmp_path / INCEPTION_FILE
    torch.jit.save(torch.jit.script(FakeInception()), str(path))
    return path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_inception_resizes_and_normalises_as_clean_fid(inception_file: Path) -> None:
    extractor = InceptionFeatures(inception_directory(str(inception_file)), CPU, batch=2)
    features = extractor.features(IMAGES)
    assert features.shape == (5, 2048) and features.dtype == np.float32
    resized = Image.fromarray(IMAGES[3, 0].astype(np.float32), mode="F").resize((299, 299), Image.Resampling.BICUBIC)
    expected = (np.asarray(resized).clip(0, 255).mean() - 128) / 128
    np.testing.assert_allclose(features[3], expected, atol=1e-4)
    colour = np.concatenate([IMAGES, IMAGES[::-1], IMAGES], axis=1)
    assert abs(extractor.features(colour)[0, 0] - extractor.features(colour)[0, 1]) > 1e-4


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_inception_id_names_the_file_contents(inception_file: Path) -> None:
    first = InceptionFeatures(inception_file.parent, CPU).id
    inception_file.write_bytes(b"no archive")
    with pytest.raises(UserError, match="not clean-fid's Inception weights"):
        InceptionFeatures(inception_file.parent, CPU)
    assert first.startswith("inception-cleanfid-") and len(first) == len("inception-cleanfid-") + 12


class SmallInception(nn.Module):
    """What clean-fid uses of its file, with 2,048 features that differ: random convolutions, then the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 7, stride=8), nn.ReLU(), nn.Conv2d(8, 2048, 3, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        )
        for parameter in self.layers.parameters():
            nn.init.normal_(parameter, std=0.15)  # features of about Inception's size

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Matrix is singular")
@pytest.mark.parametrize("size", [48, pytest.param(2048, marks=pytest.mark.slow)])  # SciPy's root: half a minute
def test_distance_is_clean_fids_own_number_on_folders(tmp_path: Path, size: int) -> None:
    """clean-fid reads the PNG files, resizes, normalises, embeds and measures; its real weights are not at hand."""
    from cleanfid.fid import compute_fid
    from cleanfid.inception_torchscript import InceptionV3W

    torch.manual_seed(0)
    torch.jit.save(torch.jit.script(SmallInception()), str(tmp_path / INCEPTION_FILE))
    random = np.random.default_rng(1)
    sets = []
    for name, low in (("a", 0), ("b", 60)):
        images = random.integers(low, 256, (60, 3, 12, 12), dtype=np.uint8)
        (tmp_path / name).mkdir()
        for number, image in enumerate(images):
            Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / name / f"{number:02d}.png")
        sets.append(images)
    theirs = InceptionV3W(str(tmp_path), download=False)

    def embed(x: Tensor) -> Tensor:
        return theirs(x)[:, :size]

    folders = [str(tmp_path / name) for name in ("a", "b")]
    expected = compute_fid(*folders, device=CPU, num_workers=0, custom_feat_extractor=embed, verbose=False)
    extractor = InceptionFeatures(tmp_path, CPU)
    first, second = (extractor.features(images)[:, :size] for images in sets)
    assert frechet_of_features(first, second) == pytest.approx(expected, abs=1e-3)
    assert expected > 0.1  # a hundred times the tolerance


def test_missing_weights_say_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.evaluation.features.INCEPTION_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for extractor, path, words in (
        (Extractor.inception, "", "https://"),
        (Extractor.inception, str(tmp_path / "elsewhere"), "evaluation.extractor_path"),
        (Extractor.dinov2, "", "hf download facebook/dinov2-large"),
        (Extractor.dinov2, str(tmp_path), "evaluation.extractor_path"),
    ):
        with pytest.raises(UserError) as caught:
            check_weights(extractor, path)
        assert words in str(caught.value) and "\n" not in str(caught.value)
        assert str(caught.value).startswith(f"evaluation.extractor={extractor.value}: ")
    check_weights(Extractor.classifier, "")


@pytest.fixture
def dino_directory(tmp_path: Path) -> Path:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56, mlp_ratio=2
    )
    Dinov2Model(config).save_pretrained(tmp_path)
    return tmp_path


def test_dinov2_gives_the_class_token(dino_directory: Path) -> None:
    from transformers import Dinov2Model
    from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    check_weights(Extractor.dinov2, str(dino_directory))
    extractor = DinoFeatures(dinov2_directory(str(dino_directory)), CPU, batch=2)
    features = extractor.features(IMAGES)
    assert features.shape == (5, 32) and extractor.id.startswith("dinov2-")
    flat = np.full((1, 3, 16, 16), 200, dtype=np.uint8)  # resizing cannot change it
    pixels = (200 / 255 - np.array(IMAGENET_DEFAULT_MEAN)) / np.array(IMAGENET_DEFAULT_STD)
    x = torch.tensor(pixels, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 224, 224)
    with torch.no_grad():
        expected = Dinov2Model.from_pretrained(dino_directory).eval()(pixel_values=x).last_hidden_state[:, 0]
    np.testing.assert_allclose(extractor.features(flat), expected.numpy(), atol=1e-4)


def test_damaged_dinov2_weights_are_named(dino_directory: Path) -> None:
    (dino_directory / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=f"{dino_directory}: not the weights of a DINOv2 model"):
        DinoFeatures(dino_directory, CPU)
