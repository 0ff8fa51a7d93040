"""The sidecar as a contender: sampling alone, and with its shards encoded and written; and the pool it makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from speed.ours import program_config
from speed.sizes import Sizes, make_config, write_dataset
from speed.trajectories import check, of_batch, of_shard, stored
from speed.turns import Turns
from trainer.config import Config, Precision
from trainer.engine import DTYPES
from trainer.models.teacher import load_teacher, read_card, save_teacher
from trainer.replay.request import ReplayRequest, make_request, write_request
from trainer.replay.sidecar import Sampler
from trainer.replay.state import write_state
from trainer.replay.teacher import open_teacher
from trainer.replay.told import Told
from trainer.replay.trajectory import sample_trajectories
from trainer.run import RunDir
from trainer.steps import fresh_model, steps_per_task


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


def sampler_config(sizes: Sizes, directory: Path, seed: int, name: str, compiled: bool) -> Config:
    """A pool larger than what is timed, each of its shards sampled in one batch."""
    uses = sizes.shard_trajectories * 10 // sizes.batch * sizes.batch
    return make_config(
        sizes,
        directory,
        name,
        run={"seed": seed},
        train={"images_per_task": 2 * sizes.total_steps * uses},
        replay={
            "shard_trajectories": sizes.sampler_batch,
            "sampler_batch": sizes.sampler_batch,
            "pool_gb": 1000,
            "compile": compiled and sizes.compile,
        },
    )


def open_sampler(
    sizes: Sizes, directory: Path, seed: int, name: str, compiled: bool = True
) -> tuple[RunDir, ReplayRequest]:
    """A run whose trainer asks for a pool."""
    config = sampler_config(sizes, directory, seed, name, compiled)
    run = RunDir(Path(config.run.dir) / config.run.name)
    request = publish_teacher(config, run)
    announce(run, request)
    return run, request


def sampling_alone(turns: Turns, *, sizes: Sizes, directory: Path, seed: int, how: str) -> None:
    """A contender: the trajectories of one shard after another, left on the device.

    Args: how: "compiled"; "graphs", which are there on CUDA alone; "eager".
    """
    run, request = open_sampler(sizes, directory, seed, f"sampling-{how}", compiled=how == "compiled")
    as_a_sidecar()
    if how == "eager":
        model, schedule, _ = load_teacher(run.teacher(1), turns.device, DTYPES[Precision(request.precision)])
    else:
        model, schedule = open_teacher(run, request, turns.device)
    turns.facts["evaluations"] = sizes.sampler_batch * request.evaluations_per_trajectory
    step = 0
    with torch.inference_mode():
        turns.start()
        while True:
            indices = np.arange(sizes.sampler_batch, dtype=np.int64) + step * sizes.sampler_batch
            batch = sample_trajectories(model, schedule, request, indices, turns.device)
            if step == 0:
                turns.facts["error"] = check(of_batch(batch), make_unet(sizes, directory, seed), request)
            step += 1
            turns.step_done()


def sidecar(turns: Turns, *, sizes: Sizes, directory: Path, seed: int) -> None:
    """A contender: the sampler as the sidecar runs it, with its shards written to the run directory."""
    run, request = open_sampler(sizes, directory, seed, "sidecar")
    as_a_sidecar()
    turns.facts["evaluations"] = sizes.sampler_batch * request.evaluations_per_trajectory
    known = 0

    def alive() -> None:
        nonlocal known
        while sampler.made > known:  # a shard is published
            if known == 0:
                first = of_shard(next(run.replay(2).glob("replay-*.tar")), turns.device)
                turns.facts["error"] = check(first, make_unet(sizes, directory, seed), request)
            known += 1
            turns.step_done()

    sampler = Sampler(run, 0, 1, turns.device, alive=alive)
    turns.start()
    sampler.serve()
    raise AssertionError("the pool is larger than what is timed")


def as_a_sidecar() -> None:
    """What `trainer.replay.sidecar.serve` sets for its process."""
    torch.set_num_threads(1)
    torch.backends.cudnn.benchmark = False


def make_unet(sizes: Sizes, directory: Path, seed: int) -> nn.Module:
    """The teacher's U-Net."""
    return fresh_model(make_config(sizes, directory, "reference", run={"seed": seed})).unet
