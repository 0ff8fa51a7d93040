"""The memory of a trainer's device: what training keeps there, a limit to it, and what to say when it is full."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import wraps
from typing import ParamSpec

import torch

from trainer.config import Config, PenaltyName, Precision
from trainer.errors import UserError
from trainer.replay.memory import is_out_of_memory

WIDTH = {Precision.fp32: 4, Precision.bf16: 2, Precision.fp16: 2}  # bytes of one weight
FP32 = 4
P = ParamSpec("P")


def state_bytes(parameters: int, config: Config, trainers: int) -> dict[str, int]:
    """Bytes on each trainer's device by part, without activations (Rajbhandari et al. 2020, section 3).

    ZeRO 1 shares out what the optimiser keeps, 2 the gradients too, 3 the weights too. From stage 1 on DeepSpeed keeps
    an fp32 master copy beside the weights, in fp32 too, and copies the rank's gradients to fp32 for the step.
    """
    stage, width = config.zero.stage, WIDTH[config.train.precision]
    share = math.ceil(parameters / trainers)
    held = {part: share if stage >= first else parameters for part, first in _SHARED_FROM.items()}
    return {
        "weights": width * held["weights"],
        "gradients": width * held["gradients"],
        "master weights": FP32 * share if stage else 0,
        "moments": 2 * FP32 * held["optimiser"],
        "gradients in fp32": FP32 * share if stage else 0,
        "EMA": FP32 * held["optimiser"] if config.ema.decay else 0,
        "penalty": FP32 * held["optimiser"] * _penalty_vectors(config),
    }


def _penalty_vectors(config: Config) -> int:
    """Vectors as long as a rank's weights that the penalty takes in the last task, and within a step beside the fp32
    gradients, which are its own from stage 1 on."""
    earlier = len(config.data.tasks) - 1
    kept = {PenaltyName.none: 0, PenaltyName.l2: 1, PenaltyName.ewc: 3, PenaltyName.rank1_ewc: earlier}
    vectors = kept[config.penalty] if earlier else 0
    return vectors + (1 if vectors and config.zero.stage == 0 else 0)


# The first ZeRO stage that shares each part out.
_SHARED_FROM = {"optimiser": 1, "gradients": 2, "weights": 3}


@contextmanager
def limited_memory(device: torch.device, margin: float) -> Generator[None, None, None]:
    """Have the allocator refuse what would leave less than this share of the device free, whoever uses the rest."""
    if device.type != "cuda":
        yield
        return
    free, total = torch.cuda.mem_get_info(device)
    allowed = (free + torch.cuda.memory_reserved(device)) / total - margin
    torch.cuda.set_per_process_memory_fraction(max(allowed, 0.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def names_the_key(step: Callable[P, None]) -> Callable[P, None]:
    """Have a training step that runs out of memory say what to do about it. It is not tried again: the other ranks may
    be waiting in the middle of it."""

    @wraps(step)
    def told(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            step(*args, **kwargs)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"out of memory in a training step ({reason}); take a smaller train.micro_batch, or "
                "train.activation_checkpointing=true: the same command with it goes on from the last checkpoint"
            ) from None

    return told
