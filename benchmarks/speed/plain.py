"""The engine's step without DeepSpeed: the same model, masters, Adam, clipping and EMA, written in PyTorch alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from speed.reference import exact
from speed.sizes import Sizes, make_config, random_examples
from speed.turns import Turns
from trainer.config import Config
from trainer.engine import DTYPES, make_optimizer
from trainer.steps import fresh_model
from trainer.world import World, join_world

BATCHES = 4


class PlainTraining:
    """Weights of `dtype`, their masters in fp32 where that is less, and Adam, clipping and EMA on the masters."""

    def __init__(self, model: nn.Module, config: Config, dtype: torch.dtype, world: World, parts: int = 1) -> None:
        """Args: model: on the device; compiled as the engine compiles it where the configuration says so.
        parts: the batch is cut into so many, whose gradients add up."""
        self.parts, self.world = parts, world
        self.weights: list[Tensor] = list(model.parameters())
        initial = [weight.detach().clone() for weight in self.weights]
        self.model = self.predict = model.to(dtype)
        if config.train.compile:
            mode = "max-autotune-no-cudagraphs" if config.train.autotune else "default"
            self.predict = torch.compile(self.model, dynamic=False, mode=mode)
        low = dtype in (torch.bfloat16, torch.float16)
        self.masters: list[Tensor] = [nn.Parameter(value) for value in initial] if low else self.weights
        self.averages = [master.detach().clone() for master in self.masters]
        self.optimizer = make_optimizer(cast(list[nn.Parameter], self.masters), config.optimizer)
        self.decay, self.clip_norm = config.ema.decay, config.optimizer.clip_norm
        self.mark: Callable[[str], None] = lambda section: None  # told what begins

    def step(self, x: Tensor, t: Tensor, label: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """One step; its loss, and the gradient's norm before clipping."""
        size, losses = len(x) // self.parts, []
        for part in range(self.parts):
            rows = slice(part * size, (part + 1) * size)
            self.mark("forward")
            loss = mse_loss(self.predict(x[rows], t[rows], label[rows]).float(), target[rows].float()) / self.parts
            self.mark("backward")
            loss.backward()
            losses.append(loss.detach())
        self.mark("optimizer")
        norm = self._update()
        self.mark("rest")
        return torch.stack(losses).sum(), norm

    @torch.no_grad()
    def _update(self) -> Tensor:
        gradients = [weight.grad for weight in self.weights if weight.grad is not None]
        assert len(gradients) == len(self.weights), "every weight has one"
        if self.world.size > 1:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            dist.all_reduce(flat, op=dist.ReduceOp.SUM)
            pieces = (flat / self.world.size).split([gradient.numel() for gradient in gradients])
            for gradient, piece in zip(gradients, pieces, strict=True):
                gradient.copy_(piece.view_as(gradient))
        if self.masters is not self.weights:
            for master, gradient in zip(self.masters, gradients, strict=True):
                master.grad = gradient.float()
        norm = nn.utils.get_total_norm([master.grad for master in self.masters if master.grad is not None])
        nn.utils.clip_grads_with_norm_(self.masters, self.clip_norm, norm)
        self.optimizer.step()
        if self.masters is not self.weights:
            torch._foreach_copy_(self.weights, self.masters)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_lerp_(self.averages, self.masters, 1 - self.decay)  # pyright: ignore[reportPrivateImportUsage]
        for weight in self.weights:
            weight.grad = None
        return norm


def plain_training(turns: Turns, *, sizes: Sizes, directory: Path, seed: int, compiled: bool) -> None:
    """A contender."""
    _take_steps(turns, sizes, directory, seed, compiled, None, 1)


def reference_training(turns: Turns, *, sizes: Sizes, directory: Path, seed: int) -> None:
    """A contender for the losses alone: the same steps, exact."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        _take_steps(turns, sizes, directory, seed, False, exact(turns.device), max(1, sizes.batch // 16))


def _take_steps(
    turns: Turns, sizes: Sizes, directory: Path, seed: int, compiled: bool, dtype: torch.dtype | None, parts: int
) -> None:
    config = make_config(sizes, directory, "plain", train={"compile": compiled})
    world = join_world(0, config.train.threads)
    own = DTYPES[config.train.precision]  # what the inputs are rounded to, for every contender
    model = fresh_model(config).to(world.device)
    training = PlainTraining(model, config, dtype or own, world, parts)
    training.mark = turns.marks
    batches = random_examples(sizes, BATCHES, seed, world, own)
    turns.start()
    while True:
        for batch in batches:
            turns.note(*training.step(*batch))
            turns.step_done()
