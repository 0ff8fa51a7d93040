"""Whether sampled trajectories are what they should be: DDIM's end points, and the teacher's predictions there."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import WrongResult
from torch import Tensor, nn

from speed.reference import PART, exact, linear_alpha_bar
from trainer.kernels.philox import normal_reference
from trainer.replay.request import ReplayRequest
from trainer.replay.trajectory import TrajectoryBatch

# Relative errors in arithmetic of this type. A path amplifies rounding: its first prediction, divided by the signal at
# T - 1, counts 157 times before clipping. So paths in bf16 are only roughly alike (unrelated ones are 1.4 apart), and
# what they compute is judged by the predictions.
END_ERROR = {"bf16": 0.6, "fp32": 1e-3}
TARGET_ERROR = {"bf16": 3e-2, "fp32": 1e-3}


@dataclass(frozen=True)
class Trajectories:
    """Some of a batch, as stored: end points (B, C, H, W), the teacher's predictions (B, P, C, H, W) where they are
    noised again, start seeds and labels (B,), timesteps and noise seeds (B, P)."""

    ends: Tensor
    targets: Tensor
    starts: Tensor
    label: Tensor
    t: Tensor
    seeds: Tensor


def of_batch(batch: TrajectoryBatch) -> Trajectories:
    """The first of a batch on its device."""
    assert batch.end is not None and batch.targets is not None, "distillation of re-noised points has them"
    parts = (batch.end, batch.targets, batch.start_seeds, batch.label, batch.t, batch.seeds)
    return Trajectories(*(part[:PART] for part in parts))


def of_shard(path: Path, device: torch.device) -> Trajectories:
    """The first of a shard's file."""
    rows = stored(path)[:PART]
    images = (torch.from_numpy(np.stack([row[name] for row in rows])) for name in ("end.npy", "targets.npy"))
    numbers = (torch.tensor([row["json"][name] for row in rows]) for name in ("seed", "label", "timesteps", "seeds"))
    return Trajectories(*(part.to(device) for part in (*images, *numbers)))


def stored(shard: Path) -> list[dict[str, Any]]:
    """The members of each trajectory in a shard's file by extension, read without the program's own reader."""
    trajectories: dict[str, dict[str, Any]] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None, "a shard holds files"
            data = file.read()
            value = json.loads(data) if extension == "json" else np.load(io.BytesIO(data), allow_pickle=False)
            trajectories.setdefault(key, {})[extension] = value
    return list(trajectories.values())


@torch.no_grad()
def check(found: Trajectories, unet: nn.Module, request: ReplayRequest) -> dict[str, float]:
    """Relative errors of the end points and of the predictions, against the equations with an exact U-Net.

    Raises:
        WrongResult: more than rounding.
    """
    device = found.ends.device
    unet = unet.to(device, exact(device))
    grid = [round(step * request.timesteps / request.steps) - 1 for step in range(request.steps, 0, -1)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        ends = ddim_end(unet, _noise(found.starts, request, device), found.label, grid)
        targets = _predictions(unet, found, request)
    errors = {"ends": distance(found.ends, ends), "targets": distance(found.targets[:, 0], targets)}
    allowed = {"ends": END_ERROR[request.precision], "targets": TARGET_ERROR[request.precision]}
    for name, error in errors.items():
        if not error <= allowed[name]:
            raise WrongResult(f"the {name} of trajectories are {error:.2g} off (relative)")
    return errors


def distance(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|."""
    return ((found.to(expected.dtype) - expected).norm() / expected.norm()).item()


def ddim_end(unet: nn.Module, x: Tensor, label: Tensor, grid: Sequence[int]) -> Tensor:
    """x_0 from x_T with eta = 0 and a clipped x_0 (Song et al. 2021, eq. 12), for a model that predicts the noise."""
    alpha_bar = linear_alpha_bar().to(x.device, x.dtype)
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        a, b = alpha_bar[t], torch.ones_like(alpha_bar[0]) if after is None else alpha_bar[after]
        times = torch.full((len(x),), t, device=x.device)
        noise: Any = unet(x, times, class_labels=label, return_dict=False)[0]
        x0 = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
        x = b.sqrt() * x0 + (1 - b).sqrt() * noise
    return x


def _predictions(unet: nn.Module, found: Trajectories, request: ReplayRequest) -> Tensor:
    """Of the noise in the first re-noised point of each, from the end point as it is stored."""
    dtype = exact(found.ends.device)
    t, noise = found.t[:, 0], _noise(found.seeds[:, 0], request, found.ends.device)
    a = linear_alpha_bar().to(noise.device, dtype)[t][:, None, None, None]
    x = a.sqrt() * found.ends.to(dtype) + (1 - a).sqrt() * noise
    return unet(x, t, class_labels=found.label, return_dict=False)[0]


def _noise(seeds: Tensor, request: ReplayRequest, device: torch.device) -> Tensor:
    return normal_reference(seeds.cpu(), request.image_shape).to(device, exact(device))
