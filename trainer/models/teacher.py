"""The teacher on disk: `model.safetensors` and the card that says what it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor

from trainer.config import DiffusionConfig, ModelConfig, Prediction, Schedule
from trainer.data.shards import sha256_file, write_atomic
from trainer.diffusion.schedules import NoiseSchedule, make_schedule
from trainer.errors import UserError
from trainer.models.denoiser import Denoiser, build_denoiser

WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "card.json"


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
        return ModelConfig(**self.model)

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
        model=asdict(model),
        diffusion=asdict(diffusion) | {"schedule": diffusion.schedule.value, "prediction": diffusion.prediction.value},
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
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: missing: no teacher is published there") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: unreadable ({error})") from None
    names = {field.name for field in fields(TeacherCard)}
    if not isinstance(content, dict) or set(content) != names:
        raise UserError(f"{path}: not a teacher's card")
    card = TeacherCard(**content)
    try:
        make_schedule(card.diffusion_config)
        _ = card.model_config
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a teacher's card ({error})") from None
    return card


def load_teacher(
    directory: Path, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> tuple[Denoiser, NoiseSchedule, TeacherCard]:
    """The frozen model in evaluation mode and its schedule, both on `device`.

    Raises:
        UserError: a missing file, or weights that are not those of the card, naming the file.
    """
    card = read_card(directory)
    path = directory / WEIGHTS_NAME
    if (found := _sha256(path)) != card.teacher_id:
        raise UserError(f"{path}: sha256 {found[:12]}, its card says {card.teacher_id[:12]}: damaged or replaced")
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
