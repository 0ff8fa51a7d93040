"""The teacher on disk: `model.safetensors` and the card that says what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from trainer.config import DiffusionConfig, ModelConfig, OwnClassifier, Prediction, Schedule
from trainer.data.shards import IMAGE_LIMIT, drop_stale, read_regular, sha256_file, write_atomic
from trainer.diffusion.schedules import NoiseSchedule, make_schedule
from trainer.errors import UserError, one_line
from trainer.models.denoiser import Denoiser, build_denoiser, check_model

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"
CARD_LIMIT = 1 << 26  # bytes of card.json
LARGEST = 10**6  # classes, timesteps, channels: more are damage


@dataclass(frozen=True)
class TeacherCard:
    """`card.json`; written last, so its presence says that the teacher is complete."""

    teacher_id: str  # sha256 of model.safetensors, hexadecimal
    task: int  # the last task learnt
    classes: list[int]  # global ids of all classes learnt so far
    model: dict[str, Any]  # a ModelConfig
    diffusion: dict[str, Any]  # a DiffusionConfig
    image_size: int
    channels: int
    max_classes: int
    class_names: list[str]  # of all classes of the data set: a position is a class id

    @property
    def model_config(self) -> ModelConfig:
        values: dict[str, Any] = self.model | {"classifier": OwnClassifier(self.model["classifier"])}
        return ModelConfig(**values)

    @property
    def diffusion_config(self) -> DiffusionConfig:
        values = self.diffusion | {
            "schedule": Schedule(self.diffusion["schedule"]),
            "prediction": Prediction(self.diffusion["prediction"]),
        }
        return DiffusionConfig(**values)


def save_teacher(
    directory: Path,
    weights: dict[str, Tensor],
    *,
    task: int,
    classes: list[int],
    model: ModelConfig,
    diffusion: DiffusionConfig,
    image_size: int,
    channels: int,
    max_classes: int,
    class_names: list[str],
) -> TeacherCard:
    """Publish a teacher: weights first, the card last, each atomically. The same weights make the same bytes.

    Args:
        directory: made where missing; a teacher already there is replaced.
        weights: a Denoiser's state dict, fp32 on the CPU.
    """
    assert all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights.values())
    data = serialise({name: weight.detach().contiguous() for name, weight in weights.items()})
    card = TeacherCard(
        teacher_id=hashlib.sha256(data).hexdigest(),
        task=task,
        classes=[int(label) for label in classes],
        model=_plain(model),
        diffusion=_plain(diffusion),
        image_size=image_size,
        channels=channels,
        max_classes=max_classes,
        class_names=list(class_names),
    )
    card_path = directory / CARD_NAME
    if card_path.exists() and not _describes(card_path, card.teacher_id):
        card_path.unlink()  # or it would describe, for a moment, weights that it does not know
    write_atomic(directory / WEIGHTS_NAME, data)
    write_atomic(card_path, json.dumps(asdict(card), indent=1).encode())
    return card


def read_card(directory: Path) -> TeacherCard:
    """Raises UserError, naming the file, where it is missing or not a teacher's card."""
    path = directory / CARD_NAME
    drop_stale(directory.parent)
    drop_stale(directory)
    try:
        content = json.loads(read_regular(path, CARD_LIMIT))
    except FileNotFoundError:
        raise UserError(f"{path}: missing: no teacher is published there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)})") from None
    names = {field.name for field in fields(TeacherCard)}
    if not isinstance(content, dict) or set(content) != names:
        raise UserError(f"{path}: not a teacher's card")
    if isinstance(content["model"], dict):  # keys that are younger than the card: their defaults are what it meant
        content["model"] = _plain(ModelConfig()) | content["model"]
    card = TeacherCard(**content)
    if not _well_formed(card):
        raise UserError(f"{path}: not a teacher's card (a field has a wrong type or an impossible value)")
    try:
        make_schedule(card.diffusion_config)
        check_model(card.model_config, image_size=card.image_size, max_classes=card.max_classes)
    except ValueError as error:
        raise UserError(f"{path}: not a teacher's card ({one_line(error)})") from None
    return card


def _well_formed(card: TeacherCard) -> bool:
    """Whether the fields of a card read from a file have the types and sizes that ours have."""
    if not _alike(card.model, _plain(ModelConfig())) or not _alike(card.diffusion, _plain(DiffusionConfig())):
        return False
    numbers = [card.task, card.image_size, card.channels, card.max_classes]
    if not all(type(number) is int for number in numbers) or not isinstance(card.teacher_id, str):
        return False
    if not _all(card.classes, int) or not _all(card.class_names, str):
        return False
    return (
        0 < card.image_size <= IMAGE_LIMIT
        and card.channels in (1, 3)
        and 0 <= card.max_classes <= LARGEST
        and card.diffusion["timesteps"] <= LARGEST
        and len(card.model["channels"]) <= 16
        and all(channels <= LARGEST for channels in card.model["channels"])
        and card.model["layers_per_block"] <= 64
        and card.model["classifier_width"] <= LARGEST
        and card.model["classifier"] in [classifier.value for classifier in OwnClassifier]
    )


def _alike(values: object, section: dict[str, Any]) -> bool:
    """Whether values read from a file have the keys and types of a section of the configuration."""
    if not isinstance(values, dict) or values.keys() != section.keys():
        return False
    kinds = {key: type(value) for key, value in section.items()}
    return all(_all(values[key], int) if kind is list else type(values[key]) is kind for key, kind in kinds.items())


def _plain(section: ModelConfig | DiffusionConfig) -> dict[str, Any]:
    """As JSON keeps a section of the configuration."""
    return {key: value.value if isinstance(value, Enum) else value for key, value in asdict(section).items()}


def _all(values: object, kind: type) -> bool:
    return isinstance(values, list) and all(type(value) is kind for value in values)


def check_teacher(directory: Path) -> TeacherCard:
    """The card of a teacher whose weights are those that it describes. Raises UserError, naming the file."""
    card, path = read_card(directory), directory / WEIGHTS_NAME
    if (found := _sha256(path)) != card.teacher_id:
        raise UserError(
            f"{path}: sha256 {found[:12]}, its card says {one_line(card.teacher_id[:12])}: damaged or replaced"
        )
    return card


def load_teacher(
    directory: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, NoiseSchedule, TeacherCard]:
    """The frozen model in evaluation mode and its schedule, both on `device`.

    Raises:
        UserError: a missing file, or weights that are not those of the card, naming the file.
    """
    card = check_teacher(directory)
    path = directory / WEIGHTS_NAME
    with torch.device("meta"):  # no initial values: they would cost time and draws of torch's generator
        model = build_denoiser(
            card.model_config, image_size=card.image_size, channels=card.channels, max_classes=card.max_classes
        )
    try:
        model.load_state_dict(load_file(path), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{path}: not the weights of the model on its card ({_first_line(error)})") from None
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return model, make_schedule(card.diffusion_config).to(device), card


def _describes(path: Path, teacher_id: str) -> bool:
    try:
        return json.loads(path.read_bytes()).get("teacher_id") == teacher_id
    except (ValueError, AttributeError):
        return False


def _sha256(path: Path) -> str:
    try:
        return sha256_file(path)
    except OSError as error:
        raise UserError(f"{path}: unreadable ({error.strerror})") from None


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
