"""Continual-learning methods, one file each, with its equation in the docstring."""

from __future__ import annotations

from collections.abc import Callable

from trainer.config import Config, MethodName, PenaltyName, Share
from trainer.diffusion.schedules import NoiseSchedule
from trainer.methods.base import Method, Rehearsal, Terms, Weights, min_snr_weights
from trainer.methods.classifying import Classifying
from trainer.methods.ewc import Ewc
from trainer.methods.experience_replay import ExperienceReplay
from trainer.methods.finetune import Finetune
from trainer.methods.gaussian_distillation import GaussianDistillation
from trainer.methods.generative_distillation import GenerativeDistillation
from trainer.methods.generative_replay import GenerativeReplay
from trainer.methods.jdcl import Jdcl
from trainer.methods.joint import Joint
from trainer.methods.l2 import L2
from trainer.methods.lwf import Lwf
from trainer.methods.partial_generation import PartialGeneration
from trainer.methods.penalty import Memory, Penalty
from trainer.methods.rank1_ewc import Rank1Ewc

__all__ = [
    "Memory",
    "Method",
    "Penalty",
    "Rehearsal",
    "Terms",
    "Weights",
    "build_method",
    "build_penalty",
    "current_share",
    "task_weights",
]


def build_method(config: Config) -> Method:
    """The method a configuration names; those that are penalties finetune (see `build_penalty`)."""
    method, jdcl = config.method, config.jdcl
    classifying = build_classifying(config)
    if method.name is MethodName.jdcl:
        assert classifying is not None, "checked with the configuration"
        return Jdcl(classifying, jdcl.noise_weight, jdcl.label_weight, jdcl.logit_weight, jdcl.distil)
    if method.name is MethodName.joint:
        return Joint(classifying)
    if method.name is MethodName.experience_replay:
        return ExperienceReplay(method.rehearsal_coefficient)
    taught: dict[MethodName, Callable[[float], Method]] = {
        MethodName.generative_replay: GenerativeReplay,
        MethodName.generative_distillation: GenerativeDistillation,
        MethodName.lwf: Lwf,
        MethodName.gaussian_distillation: GaussianDistillation,
        MethodName.partial_generation: PartialGeneration,
    }
    return taught[method.name](method.distillation_weight) if method.name in taught else Finetune(classifying)


def build_classifying(config: Config) -> Classifying | None:
    """What a classifier within the model weighs; None without one."""
    if not config.classifies:
        return None
    jdcl = config.jdcl
    labelled = config.data.labelled
    return Classifying(jdcl.classification_weight, labelled, jdcl.fixmatch_weight, jdcl.fixmatch_threshold)


def build_penalty(config: Config) -> Penalty | None:
    """What holds the weights beside the method or as the method; remembers no task yet."""
    kinds: dict[PenaltyName, Callable[[float], Penalty]] = {
        PenaltyName.l2: L2,
        PenaltyName.ewc: Ewc,
        PenaltyName.rank1_ewc: Rank1Ewc,
    }
    kind = kinds.get(config.penalty)
    return None if kind is None else kind(config.method.penalty_weight)


def current_share(config: Config, task: int) -> float:
    """What a task, counted from 1, weighs against all that was learnt before: `method.share`."""
    if config.method.share is Share.classes:
        return len(config.data.tasks[task - 1]) / len(config.classes_until(task))
    return 1.0 / task


def task_weights(config: Config, task: int, schedule: NoiseSchedule) -> Weights:
    """How much the examples of a task count, counted from 1; on the device of the schedule."""
    gamma = config.method.min_snr
    return Weights(current_share(config, task), min_snr_weights(schedule, gamma) if gamma else None)
