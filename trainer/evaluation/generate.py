"""Samples for evaluation: image i is a pure function of (weights, seed, draw, i), however many ranks share the work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import Solver
from trainer.diffusion.samplers import sample_path, timestep_grid
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.philox import normal
from trainer.seeds import derive


class SampledModel(Protocol):
    """What sampling needs of a model: `trainer.models.denoiser.Denoiser` has it."""

    @property
    def conditional(self) -> bool: ...

    @property
    def null_label(self) -> int | None: ...

    @property
    def training(self) -> bool: ...

    def train(self, mode: bool = True) -> object: ...

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How images are sampled (`trainer.diffusion.samplers.sample_path`), with `steps` steps.

    `purpose` and `draw` tell start noises of one run apart: `draw` is the number of the task just learnt, or 0 to see
    the same noise again.
    """

    seed: int
    draw: int
    shape: tuple[int, int, int]  # C, H, W
    steps: int
    solver: Solver = Solver.ddim
    eta: float = 0.0
    guidance: float = 1.0  # 1: none; needs a model with a null label
    clip: bool = True
    batch: int = 500  # images sampled at once
    purpose: str = "evaluation"


def asked_labels(classes: Sequence[int], indices: NDArray[np.int64]) -> NDArray[np.int64]:
    """The class asked for by each sample index, shape (n,): the classes in turn, so balanced within one."""
    return np.asarray(classes, dtype=np.int64)[indices % len(classes)]


def balanced_count(count: int, classes: int) -> int:
    """The least number of samples >= count that has each of the classes equally often."""
    return -(-count // classes) * classes


def share_indices(count: int, rank: int, world_size: int) -> NDArray[np.int64]:
    """Sample indices of one rank, shape (ceil(count / world_size),): as many on every rank, so that gathering works.

    The last rank's may run past `count`: concatenated in the order of the ranks and cut to `count`, the samples are
    those of a single rank.
    """
    size = -(-count // world_size)
    return np.arange(rank * size, (rank + 1) * size, dtype=np.int64)


def generate(
    model: SampledModel,
    schedule: NoiseSchedule,
    classes: Sequence[int],
    indices: NDArray[np.int64],
    sampling: Sampling,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Sample images of the classes.

    Args:
        model: its mode (training or not) is restored at the end.
        classes: class ids to ask for in turn; an unconditional model does not get them.
        indices: which samples, shape (n,).

    Returns:
        images (n, C, H, W) uint8 on the CPU, and the class ids asked for (n,) int64, None for an unconditional model.
        Values that are not finite (of a model that diverged) become mid-grey: the measures show it, and ranks that
        share the work do not part ways.
    """
    asked = asked_labels(classes, indices) if model.conditional else None
    was_training = model.training
    model.train(False)
    try:
        parts = []
        for start in range(0, len(indices), sampling.batch):
            chosen = slice(start, start + sampling.batch)
            label = None if asked is None else torch.from_numpy(asked[chosen]).to(device)
            parts.append(_sample(model, schedule, indices[chosen], label, model.null_label, sampling, device))
    finally:
        model.train(was_training)
    return torch.cat(parts), None if asked is None else torch.from_numpy(asked)


@torch.no_grad()
def _sample(
    model: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    schedule: NoiseSchedule,
    indices: NDArray[np.int64],
    label: Tensor | None,
    null_label: int | None,
    sampling: Sampling,
    device: torch.device,
) -> Tensor:
    """One batch, uint8 on the CPU."""
    keys = indices.astype(np.uint64)
    start, walk = (
        torch.from_numpy(derive(sampling.seed, f"{sampling.purpose}-{what}", keys, sampling.draw)).to(device)
        for what in ("start", "walk")
    )
    x = normal(start, sampling.shape)
    grid = timestep_grid(schedule.timesteps, sampling.steps).to(device)
    noise_seeds = walk if sampling.eta > 0 else None
    path = sample_path(
        model,
        schedule,
        x,
        label,
        grid,
        solver=sampling.solver,
        eta=sampling.eta,
        clip=sampling.clip,
        noise_seeds=noise_seeds,
        guidance=sampling.guidance,
        null_label=null_label,
    )
    for step in path:
        x = step.x_next
    finite = torch.nan_to_num(x.float(), nan=0.0, posinf=0.0, neginf=0.0)
    return ((finite + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
