"""A teacher as a diffusers pipeline, which loads and samples without this package."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from safetensors.torch import save as serialise

from trainer.config import DiffusionConfig, Prediction, Schedule
from trainer.data.shards import fsync_directory, write_atomic
from trainer.models.denoiser import UNET_PREFIX, Denoiser
from trainer.models.exported_classifier import WEIGHTS
from trainer.models.teacher import TeacherCard, load_teacher

CONDITIONAL_SOURCE = Path(__file__).with_name("conditional_pipeline.py")
CLASSIFIER_SOURCE = Path(__file__).with_name("exported_classifier.py")
CLASSIFIER_NAME = "classifier.py"
PIPELINE_NAME = "pipeline.py"
CLASSES_NAME = "classes.json"
BETA_SCHEDULES = {Schedule.linear: "linear", Schedule.cosine: "squaredcos_cap_v2"}
PREDICTIONS: dict[Prediction, Literal["epsilon", "v_prediction"]] = {
    Prediction.epsilon: "epsilon",
    Prediction.v: "v_prediction",
}


def export_pipeline(directory: Path, teacher_directory: Path) -> None:
    """Write the teacher as a directory for `DiffusionPipeline.from_pretrained(directory)`; whole or not at all.

    It loads as diffusers' own DDIMPipeline, whose call samples from an unconditional model. For a conditional one,
    which no pipeline of diffusers samples from, `pipeline.py` beside it takes `class_labels`:
    `DiffusionPipeline.from_pretrained(directory, custom_pipeline=directory, trust_remote_code=True)`. The classifier of
    a model that has one lies beside it, with `classifier.py`, whose `load_classifier(directory)` gives it.

    Raises:
        UserError: no sound teacher in `teacher_directory`.
    """
    model, _, card = load_teacher(teacher_directory, "cpu", torch.float32)
    temporary = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    try:
        _write(temporary, model.unet, card)
        if model.head is not None:
            _write_classifier(temporary, model)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.replace(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    fsync_directory(directory.parent)


def _write_classifier(directory: Path, model: Denoiser) -> None:
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(UNET_PREFIX)}
    write_atomic(directory / WEIGHTS, serialise(weights))
    write_atomic(directory / CLASSIFIER_NAME, CLASSIFIER_SOURCE.read_bytes())


def make_scheduler(config: DiffusionConfig) -> DDIMScheduler:
    """diffusers' DDIM on the same schedule, visiting the timesteps of `samplers.timestep_grid`."""
    return DDIMScheduler(
        num_train_timesteps=config.timesteps,
        beta_schedule=BETA_SCHEDULES[config.schedule],
        beta_start=config.beta_start,
        beta_end=config.beta_end,
        prediction_type=PREDICTIONS[config.prediction],
        timestep_spacing="trailing",
        clip_sample=True,
        set_alpha_to_one=True,
    )


def _write(directory: Path, unet: UNet2DModel, card: TeacherCard) -> None:
    DDIMPipeline(unet=unet, scheduler=make_scheduler(card.diffusion_config)).save_pretrained(str(directory))
    classes = {"classes": card.classes, "class_names": card.class_names, "teacher_id": card.teacher_id}
    if card.model_config.label_dropout > 0 and unet.class_embedding is not None:
        classes["null_class"] = card.max_classes
    write_atomic(directory / CLASSES_NAME, json.dumps(classes, indent=1).encode())
    if unet.class_embedding is not None:
        write_atomic(directory / PIPELINE_NAME, CONDITIONAL_SOURCE.read_bytes())
