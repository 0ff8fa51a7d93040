"""Feature extractors for the Frechet distance: the project's classifier, Inception (clean-fid), DINOv2 (transformers).

Nothing is ever downloaded: weights that are not there end the run with one line that says how to get them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from trainer.config import Extractor
from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.evaluation.classifier import Classifier

Float32 = NDArray[np.float32]

INCEPTION_FILE = "inception-2015-12-05.pt"
INCEPTION_CACHE = Path("/tmp")  # where clean-fid itself looks for and keeps the file
DINOV2_MODEL = "facebook/dinov2-large"  # ViT-L/14, as in Stein et al. 2023 (arXiv 2306.04675)
DINOV2_SIZE = 224  # pixels that images are resized to
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class LabelledImages(Protocol):
    """What evaluation needs of a data set: `trainer.data.dataset.TaskData` has it."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """Class ids, shape (N,)."""
        ...

    @property
    def keys(self) -> NDArray[np.uint64]:
        """Stable ids of the samples, shape (N,)."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Images, shape (n, C, H, W)."""
        ...


class FeatureExtractor(Protocol):
    """Turns images into the vectors between whose distributions the Frechet distance is taken."""

    @property
    def name(self) -> str: ...

    @property
    def id(self) -> str:
        """Numbers are comparable where this is equal: names the extractor and its weights."""
        ...

    def features(self, images: NDArray[np.uint8]) -> Float32:
        """Features (n, d) of images (n, C, H, W) uint8, C = 1 or 3."""
        ...


class InceptionFeatures:
    """Inception v3 pool3 features (2048), resized and normalised as by clean-fid (Parmar et al., arXiv 2104.11222).

    clean-fid's weights are a TorchScript archive: run by torch's own interpreter, no Python in it is executed.
    """

    name = "inception"

    def __init__(self, path: Path, device: torch.device, batch: int = 64) -> None:
        """`path`: the directory that holds INCEPTION_FILE."""
        from cleanfid.inception_torchscript import InceptionV3W
        from cleanfid.resize import build_resizer

        file = path / INCEPTION_FILE
        self.id = f"inception-cleanfid-{_file_digest(file)}"
        try:
            self._model = InceptionV3W(str(path), download=False, resize_inside=False).to(device).eval()
        except (RuntimeError, AttributeError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"{file}: not clean-fid's Inception weights ({line}): get the file again") from None
        self._resize = build_resizer("clean")
        self._device, self._batch = device, batch

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> Float32:
        parts = []
        for start in range(0, len(images), self._batch):
            colour = _rgb(images[start : start + self._batch]).transpose(0, 2, 3, 1)
            resized = np.stack([self._resize(image) for image in colour]).transpose(0, 3, 1, 2)
            parts.append(self._model(torch.from_numpy(resized).to(self._device)).float().cpu().numpy())
        return _stack(parts)


class DinoFeatures:
    """DINOv2 features: the class token after the last layer norm (Oquab et al. 2023, arXiv 2304.07193)."""

    name = "dinov2"

    def __init__(self, directory: Path, device: torch.device, batch: int = 64) -> None:
        """`directory`: as `save_pretrained` writes it (config.json, *.safetensors)."""
        from safetensors import SafetensorError
        from transformers import Dinov2Config, Dinov2Model

        try:
            config = Dinov2Config.from_pretrained(directory, local_files_only=True)
            model = Dinov2Model.from_pretrained(directory, config=config, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            line = str(error).strip().splitlines()[0]
            raise UserError(f"{directory}: not the weights of a DINOv2 model ({line}): get them again") from None
        self._model = model.to(device).eval()  # pyright: ignore[reportArgumentType]
        self.id = f"dinov2-{_weights_digest(directory)}"
        self._device, self._batch = device, batch

    @torch.no_grad()
    def features(self, images: NDArray[np.uint8]) -> Float32:
        mean = torch.tensor(IMAGENET_MEAN, device=self._device).view(1, 3, 1, 1)
        std = torch.tensor(IMAGENET_STD, device=self._device).view(1, 3, 1, 1)
        parts = []
        for start in range(0, len(images), self._batch):
            x = torch.from_numpy(_rgb(images[start : start + self._batch])).to(self._device).float() / 255.0
            x = interpolate(x, size=(DINOV2_SIZE, DINOV2_SIZE), mode="bicubic", antialias=True, align_corners=False)
            x = (x.clamp(0.0, 1.0) - mean) / std
            parts.append(self._model(pixel_values=x).pooler_output.float().cpu().numpy())
        return _stack(parts)


def check_weights(extractor: Extractor, path: str) -> None:
    """Refuse before work starts where the chosen extractor's weights are not on this machine.

    Raises:
        UserError: one line naming the key and how to get the weights.
    """
    if extractor is Extractor.inception:
        inception_directory(path)
    elif extractor is Extractor.dinov2:
        dinov2_directory(path)


def inception_directory(path: str) -> Path:
    """The directory of clean-fid's weights file: `path` is that file or its directory; empty: clean-fid's own cache."""
    place = Path(path) if path else INCEPTION_CACHE
    directory = place.parent if place.name == INCEPTION_FILE else place
    if (directory / INCEPTION_FILE).is_file():
        return directory
    from cleanfid.downloads_helper import inception_url

    raise UserError(
        f"evaluation.extractor=inception: {directory / INCEPTION_FILE} is missing; "
        f"get it from {inception_url} and set evaluation.extractor_path to it"
    )


def dinov2_directory(path: str) -> Path:
    """The directory of DINOv2's weights: `path`, or where the Hugging Face cache holds DINOV2_MODEL."""
    if path:
        directory = Path(path)
    else:
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(DINOV2_MODEL, "config.json")
        directory = Path(config).parent if isinstance(config, str) else None
    if directory and (directory / "config.json").is_file() and any(directory.glob("*.safetensors")):
        return directory
    raise UserError(
        f"evaluation.extractor=dinov2: no weights at {directory or 'the Hugging Face cache'}; "
        f"get them with 'hf download {DINOV2_MODEL}' and set evaluation.extractor_path to the folder it prints"
    )


def build_extractor(extractor: Extractor, path: str, classifier: Classifier, device: torch.device) -> FeatureExtractor:
    """The extractor of the configuration (`evaluation.extractor`, `evaluation.extractor_path`)."""
    if extractor is Extractor.classifier:
        return classifier
    if extractor is Extractor.inception:
        return InceptionFeatures(inception_directory(path), device)
    return DinoFeatures(dinov2_directory(path), device)


def _rgb(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(n, C, H, W) -> (n, 3, H, W): grey images repeat their channel."""
    return np.repeat(images, 3, axis=1) if images.shape[1] == 1 else images


def _stack(parts: list[Float32]) -> Float32:
    assert parts, "no images to take features of"
    return np.concatenate(parts).astype(np.float32, copy=False)


def _file_digest(*files: Path) -> str:
    """Twelve hex digits of the files' sha256."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:12]


def _weights_digest(directory: Path) -> str:
    return _file_digest(*sorted(directory.glob("*.safetensors")))
