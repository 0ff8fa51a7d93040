"""`train.micro_batch=auto`: the largest micro-batch that a trial of the real model finds room for.

The trial is local: no collective, so a rank that runs out of memory leaves no other waiting. What DeepSpeed will keep
beside weights and gradients is held as one block meanwhile. Under ZeRO-3 the trial holds the weights and gradients of
the whole model, more than training does: what it finds fits, and more might.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import AUTO, Config, Placement
from trainer.data.batch import Examples
from trainer.data.shards import write_atomic
from trainer.engine import BUCKET_NUMEL, DTYPES
from trainer.errors import ToldElsewhere, UserError
from trainer.memory import WIDTH, limited_memory, state_bytes
from trainer.methods import Rehearsal, Weights, build_method
from trainer.replay.memory import free_memory, is_out_of_memory
from trainer.replay.state import read_json
from trainer.run import RunDir
from trainer.steps import count_parameters, fresh_model, loads
from trainer.units import Units
from trainer.world import World

MARGIN = 0.05  # of the device's memory that the trial leaves free
PASSES = 2  # forward and backward; in the second the gradients of the first are there, as in accumulation
Build = Callable[[Config], nn.Module]


def settle(config: Config, run: RunDir, world: World, note: Callable[[str], None]) -> None:
    """Put a number in the place of `auto` in `config`, the same on every rank; collective.

    A start under the same circumstances takes what the run found before, so that it goes on with the same bits.

    Raises:
        UserError: not even one image fits.
    """
    if config.train.micro_batch != AUTO:
        return
    local = config.train.global_batch // world.size
    if world.device.type == "cpu":
        config.train.micro_batch, how = local, "a CPU takes them all"
    else:
        found, how = find(config, run, world, circumstances(config, world), lambda: largest_fitting(config, world))
        config.train.micro_batch = found
    note(f"train.micro_batch=auto: {config.train.micro_batch} of a rank's {local} images at once ({how})")


def circumstances(config: Config, world: World) -> dict[str, Any]:
    """What the choice depends on, besides what never changes in a run."""
    memory = torch.cuda.get_device_properties(world.device).total_memory
    return {
        "device": torch.cuda.get_device_name(world.device),
        "memory": memory,
        "ranks": world.size,
        "stage": config.zero.stage,
        "activation_checkpointing": config.train.activation_checkpointing,
        "rehearses": rehearses(config),
        "teacher": config.needs_teacher and config.replay.placement is Placement.inline,
    }


def rehearses(config: Config) -> bool:
    """Whether any task has replay points beside its images: not a run of one task, which may be given more later."""
    return build_method(config).rehearsal is not Rehearsal.none and len(config.data.tasks) > 1


def find(
    config: Config, run: RunDir, world: World, around: dict[str, Any], search: Callable[[], int]
) -> tuple[int, str]:
    """The micro-batch kept in the run directory for these circumstances, or else what `search` finds, which is kept
    then; and which of them it was. Collective."""
    kept = world.on_main(lambda: _read(run, config, around, world.size)) or 0
    kept = world.broadcast_int(kept)
    if kept:
        return kept, "as before"
    found = search()
    content = json.dumps({"micro_batch": found, "for": around}, indent=1)
    world.on_main(lambda: write_atomic(run.micro_batch, content.encode()))
    return found, "the most that fit in a trial"


def _read(run: RunDir, config: Config, around: dict[str, Any], ranks: int) -> int:
    content = read_json(run.micro_batch)
    kept = content.get("micro_batch")
    if type(kept) is int and content.get("for") == around and kept in choices(config, ranks):
        return kept
    return 0


def choices(config: Config, ranks: int) -> list[int]:
    """Micro-batches into which a rank's real images and its replay points both divide, largest first."""
    images, points = config.train.global_batch // ranks, config.replay_batch // ranks
    return [images // parts for parts in range(1, images + 1) if images % parts == points % parts == 0]


def largest_fitting(config: Config, world: World, build: Build = fresh_model) -> int:
    """The largest of `choices` that goes through on every rank; collective.

    Raises:
        UserError: not even the smallest does (ToldElsewhere on all ranks but one).
    """
    with Trial(config, world, build) as trial:
        fitting = next(filter(trial.fits, choices(config, world.size)), 0)
    least = min(row[0] for row in world.exchange([fitting]))
    if least:
        return least
    why = "train.micro_batch=auto: the smallest micro-batch does not fit into the device's memory"
    if not world.is_main:
        raise ToldElsewhere(why)
    raise UserError(
        f"{why}; take train.activation_checkpointing=true or a smaller model, or a number that is known to fit"
    )


class Trial:
    """The model on the device, with as much memory taken beside it as training will; a context manager, after which
    all of that is given back."""

    def __init__(self, config: Config, world: World, build: Build) -> None:
        self._config, self._device, self._ranks = config, world.device, world.size
        self._dtype = DTYPES[config.train.precision]
        self._method = build_method(config)
        self._rehearses = rehearses(config)
        self._weights = Weights(share=0.5 if self._rehearses else 1.0)
        self._build = build
        self._held: tuple[nn.Module, Tensor] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Trial:
        devices = [self._device] if self._device.type == "cuda" else []
        self._stack.enter_context(torch.random.fork_rng(devices))
        self._stack.enter_context(limited_memory(self._device, MARGIN))
        return self

    def __exit__(self, *_: object) -> None:
        self._held = None
        self._forget()
        self._stack.close()

    def fits(self, images: int) -> bool:
        """Whether real forward and backward passes of so many images, with their replay points, go through."""
        try:
            for _ in range(PASSES):
                self._pass(images)
            return True
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        finally:
            self._forget()
        return False

    def _pass(self, images: int) -> None:
        model, _ = self._hold()
        parts = self._config.train.global_batch // self._ranks // images
        points = self._config.replay_batch // self._ranks // parts
        for current, rehearsed in loads(self._config, self._examples, images, points if self._rehearses else 0):
            self._method.loss(model, current, rehearsed, self._weights)["loss"].backward()

    def _hold(self) -> tuple[nn.Module, Tensor]:
        """The model, and a block as large as what training keeps beside it."""
        if self._held is None:
            train = self._config.train
            model = self._build(self._config)
            units = Units(model, gathered=False, recompute=train.activation_checkpointing)  # as the engine makes them
            if train.compile:
                units.compile(autotune=train.autotune)
            model.to(self._device, self._dtype).train()
            size = beside_bytes(self._config, self._ranks)
            on_gpu = self._device.type == "cuda"
            self._held = model, torch.empty(size if on_gpu else 0, dtype=torch.uint8, device=self._device)
        return self._held

    def _examples(self, count: int) -> Examples:
        data = self._config.data
        image = torch.zeros(
            count, data.channels, data.image_size, data.image_size, dtype=self._dtype, device=self._device
        )
        number = torch.zeros(count, dtype=torch.int64, device=self._device)
        return Examples(image, number, image, number)

    def _forget(self) -> None:
        """Gradients, and code that was compiled for this size: the next is to be compiled for its own."""
        if self._held is not None:
            self._held[0].zero_grad(set_to_none=True)
        if self._config.train.compile:
            torch.compiler.reset()
        gc.collect()  # switched off otherwise; what failed may have left cycles
        free_memory(self._device)


def beside_bytes(config: Config, ranks: int) -> int:
    """What a rank's device holds in training besides weights, gradients and activations: what `trainer.plan` counts,
    DeepSpeed's bucket, and the teacher of inline replay."""
    parameters = count_parameters(config)
    state = state_bytes(parameters, config, ranks)
    held = sum(size for part, size in state.items() if part not in ("weights", "gradients"))
    if config.zero.stage:
        held += min(parameters, BUCKET_NUMEL) * DTYPES[config.train.precision].itemsize
    if config.needs_teacher and config.replay.placement is Placement.inline:
        held += WIDTH[config.replay.precision] * parameters
    return held
