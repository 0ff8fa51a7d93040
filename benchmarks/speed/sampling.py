"""The sidecar as a contender: sampling alone, and with its shards encoded and written; and the pool it makes."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import WrongResult
from torch import Tensor, nn

from speed.ours import program_config
from speed.reference import PART, exact, linear_alpha_bar
from speed.sizes import Sizes, make_config, write_dataset
from speed.turns import Turns
from trainer.config import Config
from trainer.kernels.philox import normal_reference
from trainer.models.teacher import read_card, save_teacher
from trainer.replay.request import ReplayRequest, make_request, write_request
from trainer.replay.sidecar import Sampler
from trainer.replay.state import write_state
from trainer.replay.teacher import open_teacher
from trainer.replay.told import Told
from trainer.replay.trajectory import sample_trajectories
from trainer.run import RunDir
from trainer.steps import fresh_model, steps_per_task

PATH_ERROR = {"bf16": 5e-2, "fp32": 1e-3}  # of a path's end, relative to the exact one: clipping amplifies rounding


def publish_teacher(config: Config, run: RunDir) -> ReplayRequest:
    """The untrained model as the teacher of task 1, and the request for learning task 2 with it."""
    with torch.random.fork_rng(devices=[]):
        weights = {name: value.detach().cpu() for name, value in fresh_model(config).state_dict().items()}
    save_teacher(
        run.teacher(1),
        weights,
        task=1,
        classes=config.classes_until(1),
        model=config.model,
        diffusion=config.diffusion,
        image_size=config.data.image_size,
        channels=config.data.channels,
        max_classes=config.max_classes,
        class_names=[str(label) for label in range(config.data.classes)],
    )
    card = read_card(run.teacher(1))
    return make_request(config, run, 2, config.classes_until(1), card, steps_per_task(config))


def announce(run: RunDir, request: ReplayRequest) -> None:
    """Ask the samplers for a pool."""
    write_request(run, request)
    write_state(run, request.task)


def make_pools(turns: Turns, *, sizes: Sizes, directory: Path, seed: int) -> None:
    """Not a contender: writes the images and the pool that the program's contenders learn from, then says so.

    `facts`: shards made, and the mean square of the stored predictions.
    """
    write_dataset(program_config(sizes, directory, seed, "pool"), sizes.images)
    for mode in ("pool", "inline"):
        config = program_config(sizes, directory, seed, mode)
        run = RunDir(Path(config.run.dir) / config.run.name)
        request = publish_teacher(config, run)
        if mode == "pool":
            announce(run, request)
            fill_pool(run, turns.device, request.shards)
            targets = [row["targets.npy"] for row in stored(next(run.replay(2).glob("replay-*.tar")))]
            turns.facts["target_square"] = float(np.mean(np.square(targets, dtype=np.float64)))
            turns.facts["shards"] = request.shards
    turns.start()


def fill_pool(run: RunDir, device: torch.device, shards: int) -> None:
    """Have the sidecar's sampler make a whole pool."""
    stop = Told()

    def alive() -> None:
        if sampler.made >= shards:
            stop.set()

    sampler = Sampler(run, 0, 1, device, alive=alive, stop=stop)
    sampler.serve()


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


def sampler_config(sizes: Sizes, directory: Path, seed: int, name: str, shards: int) -> Config:
    """A pool of so many shards, each sampled in one batch."""
    uses = sizes.shard_trajectories * 10 // sizes.batch * sizes.batch
    return make_config(
        sizes,
        directory,
        name,
        run={"seed": seed},
        train={"images_per_task": max(1, shards) * uses},
        replay={"shard_trajectories": sizes.sampler_batch, "sampler_batch": sizes.sampler_batch, "pool_gb": 1000},
    )


def open_sampler(sizes: Sizes, directory: Path, seed: int, name: str) -> tuple[RunDir, ReplayRequest]:
    """A run whose trainer asks for a pool larger than what is timed."""
    config = sampler_config(sizes, directory, seed, name, 2 * sizes.total_steps)
    run = RunDir(Path(config.run.dir) / config.run.name)
    request = publish_teacher(config, run)
    announce(run, request)
    return run, request


def sampling_alone(turns: Turns, *, sizes: Sizes, directory: Path, seed: int) -> None:
    """A contender: the trajectories of one shard after another, left on the device."""
    run, request = open_sampler(sizes, directory, seed, "sampling-alone")
    torch.backends.cudnn.benchmark = False  # as `trainer.replay.sidecar.serve` does
    model, schedule = open_teacher(run, request, turns.device)
    turns.facts["evaluations"] = sizes.sampler_batch * request.evaluations_per_trajectory
    step = 0
    with torch.inference_mode():
        turns.start()
        while True:
            indices = np.arange(sizes.sampler_batch, dtype=np.int64) + step * sizes.sampler_batch
            batch = sample_trajectories(model, schedule, request, indices, turns.device)
            if step == 0:
                seeds, labels = batch.start_seeds[:PART].tolist(), batch.label[:PART].tolist()
                unet = make_unet(sizes, directory, seed)
                turns.facts["error"] = check_ends(batch.images[:PART], seeds, labels, unet, request)
            step += 1
            turns.step_done()


def sidecar(turns: Turns, *, sizes: Sizes, directory: Path, seed: int) -> None:
    """A contender: the sampler as the sidecar runs it, with its shards written to the run directory."""
    run, request = open_sampler(sizes, directory, seed, "sidecar")
    torch.backends.cudnn.benchmark = False
    turns.facts["evaluations"] = sizes.sampler_batch * request.evaluations_per_trajectory
    known = 0

    def alive() -> None:
        nonlocal known
        while sampler.made > known:  # a shard is published
            if known == 0:
                rows = stored(next(run.replay(2).glob("replay-*.tar")))[:PART]
                ends = torch.from_numpy(np.stack([row["end.npy"] for row in rows])).to(turns.device)
                seeds, labels = ([row["json"][name] for row in rows] for name in ("seed", "label"))
                turns.facts["error"] = check_ends(ends, seeds, labels, make_unet(sizes, directory, seed), request)
            known += 1
            turns.step_done()

    sampler = Sampler(run, 0, 1, turns.device, alive=alive)
    turns.start()
    sampler.serve()
    raise AssertionError("the pool is larger than what is timed")


def make_unet(sizes: Sizes, directory: Path, seed: int) -> nn.Module:
    """The teacher's U-Net."""
    return fresh_model(make_config(sizes, directory, "reference", run={"seed": seed})).unet


@torch.no_grad()
def check_ends(
    ends: Tensor, start_seeds: Sequence[int], labels: Sequence[int], unet: nn.Module, request: ReplayRequest
) -> float:
    """The relative error of end points (B, C, H, W) against DDIM's equation, exact, from the same noise.

    Raises:
        WrongResult: more than rounding.
    """
    dtype = exact(ends.device)
    unet = unet.to(ends.device, dtype)
    start = normal_reference(torch.tensor(start_seeds), request.image_shape).to(ends.device, dtype)
    grid = [round(step * request.timesteps / request.steps) - 1 for step in range(request.steps, 0, -1)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected = ddim_end(unet, start, torch.tensor(labels, device=ends.device), grid)
    error = ((ends.to(dtype) - expected).norm() / expected.norm()).item()
    if not error <= PATH_ERROR[request.precision]:
        raise WrongResult(f"DDIM's end points are {error:.2g} off (relative)")
    return error


def ddim_end(unet: nn.Module, x: Tensor, label: Tensor, grid: list[int]) -> Tensor:
    """x_0 from x_T with eta = 0 and a clipped x_0 (Song et al. 2021, eq. 12), for a model that predicts the noise."""
    alpha_bar = linear_alpha_bar().to(x.device, x.dtype)
    for t, after in zip(grid, [*grid[1:], None], strict=True):
        a, b = alpha_bar[t], torch.ones_like(alpha_bar[0]) if after is None else alpha_bar[after]
        times = torch.full((len(x),), t, device=x.device)
        noise: Any = unet(x, times, class_labels=label, return_dict=False)[0]
        x0 = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
        x = b.sqrt() * x0 + (1 - b).sqrt() * noise
    return x
