"""Continual-learning methods, one file each, with its equation in the docstring."""

from __future__ import annotations

from trainer.config import MethodConfig, MethodName
from trainer.methods.base import Method, Rehearsal, Terms
from trainer.methods.experience_replay import ExperienceReplay
from trainer.methods.finetune import Finetune
from trainer.methods.generative_distillation import GenerativeDistillation
from trainer.methods.generative_replay import GenerativeReplay
from trainer.methods.joint import Joint

__all__ = ["Method", "Rehearsal", "Terms", "build_method"]


def build_method(config: MethodConfig) -> Method:
    """The method a configuration names."""
    if config.name is MethodName.joint:
        return Joint()
    if config.name is MethodName.experience_replay:
        return ExperienceReplay(config.rehearsal_coefficient)
    if config.name is MethodName.generative_replay:
        return GenerativeReplay(config.distillation_weight)
    if config.name is MethodName.generative_distillation:
        return GenerativeDistillation(config.distillation_weight)
    return Finetune()
