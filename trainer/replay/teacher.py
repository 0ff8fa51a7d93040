"""The teachers that a request names, ready to sample."""

from __future__ import annotations

from pathlib import Path

import torch

from trainer.diffusion.samplers import Predict
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.models.denoiser import Denoiser
from trainer.models.teacher import load_teacher
from trainer.replay.graphs import fast_predict
from trainer.replay.labelled import Labeller
from trainer.replay.request import ReplayRequest
from trainer.run import RunDir

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def open_teacher(run: RunDir, request: ReplayRequest, device: torch.device) -> tuple[Predict, NoiseSchedule]:
    """The frozen model, computing in the request's precision, and its schedule on `device`.

    Its weights are rounded to that precision: against autocast that costs a tenth more error and saves the casts of
    every call.

    Raises:
        UserError: missing, damaged, not the one that was asked for, or a precision that the device has not.
    """
    model, schedule = _open(run.root / request.teacher, request, request.teacher_id, device)
    return fast_predict(model, device, compiled=request.compile), schedule


def open_labellers(run: RunDir, request: ReplayRequest, device: torch.device) -> list[Labeller]:
    """The two teachers of a labelled pool: of the classes before, and of those that are learnt now.

    Raises:
        UserError: as `open_teacher` does.
    """
    labellers: list[Labeller] = []
    for name, directory, teacher_id, classes in (
        ("old", request.teacher, request.teacher_id, request.classes),
        ("local", request.local_teacher, request.local_teacher_id, request.local_classes),
    ):
        model, schedule = _open(run.root / directory, request, teacher_id, device)
        predict = fast_predict(model, device, compiled=request.compile)
        labellers.append(Labeller(name, directory, predict, model.classify, schedule, classes))
    return labellers


def _open(
    directory: Path, request: ReplayRequest, teacher_id: str, device: torch.device
) -> tuple[Denoiser, NoiseSchedule]:
    if request.precision == "fp16" and device.type == "cpu":
        raise UserError("replay.precision=fp16: not on a CPU; take fp32 or bf16")
    model, schedule, card = load_teacher(directory, device, DTYPES[request.precision])
    for key, found, wanted in (
        ("teacher_id", card.teacher_id, teacher_id),
        ("max_classes", card.max_classes if request.labelled else 0, request.outputs),
        ("classifier", model.head is not None or not request.labelled, True),
        ("image_size", card.image_size, request.image_size),
        ("channels", card.channels, request.channels),
        ("timesteps", schedule.timesteps, request.timesteps),
        ("conditional", model.conditional, request.conditional),
        ("null_label", model.null_label if request.guidance != 1.0 else -1, request.null_label),
    ):
        if found != wanted:
            raise UserError(f"{directory / 'card.json'}: {key} is {found}, {wanted} was asked for: another teacher")
    return model, schedule
