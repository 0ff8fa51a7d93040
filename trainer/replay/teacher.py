"""The teacher that a request names, ready to sample."""

from __future__ import annotations

import torch

from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import UserError
from trainer.models.denoiser import Denoiser
from trainer.models.teacher import load_teacher
from trainer.replay.request import ReplayRequest
from trainer.run import RunDir


def open_teacher(run: RunDir, request: ReplayRequest, device: torch.device) -> tuple[Denoiser, NoiseSchedule]:
    """The frozen model and its schedule on `device`.

    Raises:
        UserError: missing, damaged, not the one that was asked for, or a precision that the device has not.
    """
    if request.precision == "fp16" and device.type == "cpu":
        raise UserError("replay.precision=fp16: not on a CPU; take fp32 or bf16")
    directory = run.root / request.teacher
    model, schedule, card = load_teacher(directory, device)
    for key, found, wanted in (
        ("teacher_id", card.teacher_id, request.teacher_id),
        ("image_size", card.image_size, request.image_size),
        ("channels", card.channels, request.channels),
        ("timesteps", schedule.timesteps, request.timesteps),
        ("conditional", model.conditional, request.conditional),
    ):
        if found != wanted:
            raise UserError(f"{directory / 'card.json'}: {key} is {found}, {wanted} was asked for: another teacher")
    return model, schedule
