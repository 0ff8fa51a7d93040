"""Images of a trained run, as PNG files and as one grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from trainer.config import Solver
from trainer.errors import UserError
from trainer.evaluation.generate import Sampling, generate
from trainer.models.teacher import CARD_NAME, TeacherCard, load_teacher
from trainer.run import RunDir
from trainer.tracking.grid import save_png

BATCH = 250
CELL = 32  # least pixels of an image in the grid: small ones are enlarged by a whole factor


@dataclass(frozen=True)
class Request:
    """What to sample: `task` 0 is the newest finished one; no `classes` are all that the model learnt."""

    run: Path
    out: Path
    task: int = 0
    classes: tuple[int, ...] = ()
    count: int = 64
    steps: int = 50
    solver: Solver = Solver.ddim
    guidance: float = 1.0
    seed: int = 0
    device: str = ""


def newest_task(run: RunDir) -> int:
    """The last task whose teacher is published. Raises UserError, naming the directory, where there is none."""
    task = 0
    while (run.teacher(task + 1) / CARD_NAME).exists():
        task += 1
    if not task:
        raise UserError(f"--run {run.root}: no task is finished there ({run.teacher(1) / CARD_NAME} is missing)")
    return task


def choose_device(name: str) -> torch.device:
    """A device by name; the first GPU, or the CPU, where the name is empty."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def sample(request: Request) -> list[Path]:
    """Write `<index>-class<label>.png` (`<index>.png` from an unconditional model) and `grid.png`.

    Image i of a class list depends on weights, seed and i alone, whatever the count.

    Returns:
        The paths, the grid last.

    Raises:
        UserError: no such run or task, a class the model has not learnt, a device that is not there.
    """
    run = RunDir(request.run)
    device = choose_device(request.device)
    model, schedule, card = load_teacher(run.teacher(request.task or newest_task(run)), device)
    if not 1 <= request.steps <= schedule.timesteps:
        raise UserError(f"--steps {request.steps}: must be between 1 and the model's {schedule.timesteps} timesteps")
    if request.guidance != 1.0 and model.null_label is None:
        raise UserError(f"--guidance {request.guidance:g}: this model was not trained with model.label_dropout above 0")
    classes = _classes(request.classes, card, model.conditional)
    sampling = Sampling(
        seed=request.seed,
        draw=0,
        shape=(card.channels, card.image_size, card.image_size),
        steps=request.steps,
        solver=request.solver,
        guidance=request.guidance,
        batch=BATCH,
    )
    images, labels = generate(model, schedule, classes, np.arange(request.count), sampling, device)
    return write_images(request.out, images.numpy(), None if labels is None else labels.numpy())


def _classes(asked: Sequence[int], card: TeacherCard, conditional: bool) -> list[int]:
    if asked and not conditional:
        raise UserError("--classes: this model is unconditional, it cannot be asked for a class")
    for label in asked:
        if label not in card.classes:
            raise UserError(f"--classes {label}: not among the classes learnt up to task {card.task}: {card.classes}")
    return list(asked) or card.classes


def write_images(directory: Path, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> list[Path]:
    """One PNG per image of (N, C, H, W) and a grid, by class where there are labels (N,)."""
    width = max(4, len(str(len(images) - 1)))
    paths = []
    for index, image in enumerate(images):
        suffix = "" if labels is None else f"-class{labels[index]}"
        paths.append(directory / f"{index:0{width}d}{suffix}.png")
        save_png(paths[-1], to_picture(image))
    order = np.arange(len(images)) if labels is None else np.argsort(labels, kind="stable")
    paths.append(directory / "grid.png")
    save_png(paths[-1], to_picture(tile(images[order])))
    return paths


def tile(images: NDArray[np.uint8], gap: int = 2) -> NDArray[np.uint8]:
    """Images (N, C, H, W) row by row in a square as good as it gets, enlarged pixel by pixel to a size to look at."""
    factor = max(1, math.ceil(CELL / images.shape[-1]))
    images = images.repeat(factor, axis=2).repeat(factor, axis=3)
    count, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    canvas = np.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def to_picture(image: NDArray[np.uint8]) -> Image.Image:
    """(1 or 3, H, W) uint8."""
    return Image.fromarray(image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1))
