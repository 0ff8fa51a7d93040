"""How fast one core reads shards of images and replay points, and what a training step waits for its data.

    python benchmarks/reader.py [--json FILE] [--quick] [--images FILE.npz] [--repeats 5] [--seconds 0.5]

Images and points are counted per second of CPU time, of all threads together (of both processes for the peer), from a
warm page cache: what one core does, whatever else the machine is doing. The wait is wall time: a consumer takes a batch
of 128 images and 128 replay points each 128/1600 s, as a training step at that speed does, and sleeps in between.
`--images` takes real images; without it they are smooth random fields with some noise, which compress about as photos.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from claims import Claim, Report, WrongResult, command_line, fail, package_versions
from reading.peer import Peer, read_images, read_points
from reading.shards import (
    EXTENSIONS,
    ImageShards,
    PointsByHand,
    ReplayShards,
    images_by_hand,
    load_images,
    smooth_images,
    write_images,
    write_replay,
)

from trainer.config import Points
from trainer.data.stream import RealStream
from trainer.replay.points import StoredPoints
from trainer.replay.reader import Loader
from trainer.replay.transport import FilePool

SPEED = 1600  # images/s of a training step at 64x64, and as many replay points
CORES = 8
RAW_BAR, POINTS_BAR, WAIT_BAR = 20_000, 5_000, 1.0  # images/s/core, points/s/core, % of a step
SPARE = 2  # eight threads read this many times what a step uses: then reading ahead hides all of it but the hand-over
PREFETCH = 4
DEPTH = 16  # steps of replay points held, about what the training loop reads ahead
PEER = "webdataset in a DataLoader"


@dataclass(frozen=True)
class Sizes:
    """How much is measured; `large` and `small` are edges of images."""

    small: int = 32
    large: int = 64
    images: int = 2000
    trajectories: int = 128
    shards: int = 4
    batch: int = 128
    repeats: int = 5
    seconds: float = 0.5

    @property
    def period(self) -> float:
        """Seconds between two steps."""
        return self.batch / SPEED


QUICK = Sizes(small=8, large=12, images=150, trajectories=8, shards=2, batch=16, repeats=1, seconds=0.02)


def stream(shards: ImageShards, batch: int, workers: int) -> RealStream:
    """Batches without end, in the global order."""
    return RealStream(
        shards.data,
        seed=0,
        task=1,
        global_batch=batch,
        rank=0,
        world_size=1,
        start_step=0,
        stop_step=10**9,
        workers=workers,
        prefetch=PREFETCH,
    )


def loader(replay: ReplayShards) -> Loader:
    opened = Loader(
        FilePool(replay.directory), replay.request, replay.positions, depth=DEPTH, pin=torch.cuda.is_available()
    )
    opened.offer(replay.offers)
    return opened


def take(points: Loader, replay: ReplayShards, step: int) -> StoredPoints:
    """The points of a step, as soon as they are there."""
    points.advance(step, replay.steps)
    while points.ready_until(step) <= step:
        points.wait(step, 1.0)
    return points.take(step)


# --- correctness, before anything is timed ------------------------------------------------------------------------


def check_images(shards: ImageShards, batch: int) -> None:
    """One epoch and a little more. Raises WrongResult."""
    wanted, seen = images_by_hand(shards), set[int]()
    with stream(shards, batch, workers=2) as batches:
        for found in islice(batches, len(shards.data) // batch + 2):
            for key, image in zip(found.keys.tolist(), found.images.numpy(), strict=True):
                seen.add(key)
                if not np.array_equal(image, wanted[key]):
                    raise WrongResult(f"{shards.format}: pixels differ from those that tarfile, numpy and Pillow read")
    if len(seen) != len(wanted):
        raise WrongResult(f"{shards.format}: {len(seen)} of {len(wanted)} images in the first epoch")


def check_points(replay: ReplayShards) -> None:
    """Every point of the shards. Raises WrongResult."""
    wanted, points = PointsByHand(replay), loader(replay)
    try:
        for step in range(replay.steps):
            if not wanted.agree(replay.positions(step), take(points, replay, step)):
                raise WrongResult(f"{replay.request.points}: points differ from those that tarfile and numpy read")
    finally:
        points.close()


# --- rates -------------------------------------------------------------------------------------------------------


def per_cpu_second(advance: Callable[[], int], cpu_seconds: Callable[[], float], sizes: Sizes) -> float:
    """Samples per second of CPU time, over at least `seconds` of wall time, once what was read ahead is used up."""
    for _ in range(3 * PREFETCH):
        advance()
    began, cpu, count = time.perf_counter(), cpu_seconds(), 0
    while time.perf_counter() - began < sizes.seconds or cpu_seconds() == cpu:
        count += advance()
    return count / (cpu_seconds() - cpu)


def peer_rate(peer: Peer, sizes: Sizes) -> float:
    return per_cpu_second(lambda: len(next(peer.batches)[0]), peer.cpu_seconds, sizes)


def rate_images(shards: ImageShards, sizes: Sizes, with_peer: bool) -> tuple[list[float], list[float]]:
    """Images per CPU second, ours with one thread, and the peer's, in turns."""
    ours: list[float] = []
    theirs: list[float] = []
    peer = read_images(shards.paths, EXTENSIONS[shards.format], sizes.batch) if with_peer else None
    for _ in range(sizes.repeats):
        with stream(shards, sizes.batch, workers=1) as batches:
            ours.append(per_cpu_second(lambda batches=batches: len(next(batches)), time.process_time, sizes))
        if peer is not None:
            theirs.append(peer_rate(peer, sizes))
    if peer is not None:
        peer.close()
    return ours, theirs


def rate_points(replay: ReplayShards, sizes: Sizes) -> tuple[list[float], list[float]]:
    """Points per CPU second: read, checked against their checksum, decoded and gathered."""
    ours: list[float] = []
    theirs: list[float] = []
    peer = read_points(replay.paths, sizes.batch)
    for _ in range(sizes.repeats):
        began, cpu, count = time.perf_counter(), time.process_time(), 0
        while time.perf_counter() - began < sizes.seconds:
            points = loader(replay)
            count += sum(len(take(points, replay, step).label) for step in range(replay.steps))
            points.close()
        ours.append(count / (time.process_time() - cpu))
        theirs.append(peer_rate(peer, sizes))
    peer.close()
    return ours, theirs


def rate_threads(shards: ImageShards, sizes: Sizes, workers: int) -> tuple[list[float], list[float]]:
    """Images per second of wall time and of CPU time with so many threads."""
    wall: list[float] = []
    cpu: list[float] = []
    for _ in range(sizes.repeats):
        with stream(shards, sizes.batch, workers) as batches:
            for _ in range(2 * (PREFETCH + workers)):
                next(batches)
            began, busy, count = time.perf_counter(), time.process_time(), 0
            while time.perf_counter() - began < sizes.seconds or time.process_time() == busy:
                count += len(next(batches))
            wall.append(count / (time.perf_counter() - began))
            cpu.append(count / (time.process_time() - busy))
    return wall, cpu


def waits(shards: ImageShards, replay: ReplayShards, sizes: Sizes, workers: int) -> list[float]:
    """Share of a step, in %, that the consumer waits for its images and points; the first steps fill what is read
    ahead and do not count."""
    shares: list[float] = []
    for _ in range(sizes.repeats):
        points, waited, first = loader(replay), 0.0, PREFETCH
        try:
            with stream(shards, sizes.batch, workers) as batches:
                for step in range(replay.steps):
                    began = time.perf_counter()
                    next(batches)
                    take(points, replay, step)
                    here = time.perf_counter() - began
                    waited += here if step >= first else 0.0
                    time.sleep(max(0.0, sizes.period - here))
        finally:
            points.close()
        shares.append(100 * waited / (sizes.period * (replay.steps - first)))
    return shares


# --- the claims --------------------------------------------------------------------------------------------------


def claims_of_images(shards: ImageShards, size: int, sizes: Sizes, workers: int, report: Report) -> None:
    """One format at one size; the peer and many threads at the larger one."""
    check_images(shards, sizes.batch)
    large, what = size == sizes.large, f"{shards.format}, {size}x{size}x3"
    ours, theirs = rate_images(shards, sizes, with_peer=large)
    detail: dict[str, Any] = {"per_cpu_second": float(np.median(ours)), "member_bytes": round(shards.member_bytes)}
    detail["disk_bytes"] = round(shards.disk_bytes)
    if large:
        report.add(Claim(what, "images/s/core", 1.0, ours, theirs, needs_cuda=False, against=PEER))
        wall, cpu = rate_threads(shards, sizes, workers)
        claim = f"{what}: {workers} threads, over {SPEED} images/s"
        report.add(Claim(claim, "x", SPARE, [rate / SPEED for rate in wall], needs_cuda=False))
        detail |= {"threads_per_second": float(np.median(wall)), "threads_per_cpu_second": float(np.median(cpu))}
    if shards.format == "raw":
        report.add(Claim(f"{what}: a core reads", "images/s/core", RAW_BAR, ours, needs_cuda=False))
    report.details["images"][what] = detail


def claims_of_points(replay: ReplayShards, sizes: Sizes, report: Report) -> None:
    check_points(replay)
    ours, theirs = rate_points(replay, sizes)
    what = f"replay points, {replay.request.points}"
    report.add(
        Claim(f"{what}: a core reads", "points/s/core", POINTS_BAR, ours, needs_cuda=False),
        Claim(what, "points/s/core", 1.0, ours, theirs, needs_cuda=False, against=PEER),
    )


def measure(options: argparse.Namespace, sizes: Sizes, root: Path, report: Report) -> None:
    """Everything, one after another. Raises WrongResult."""
    workers = min(CORES, len(os.sched_getaffinity(0)))
    seed = secrets.randbits(31)
    report.details |= {"sizes": asdict(sizes), "seed": seed, "threads": workers, "images": {}}
    replay: dict[Points, ReplayShards] = {}
    for points in (Points.renoised, Points.trajectory):
        counts = {"trajectories": sizes.trajectories, "shards": sizes.shards, "batch": sizes.batch}
        replay[points] = write_replay(root / points.value, points, sizes.large, **counts, seed=seed)
        claims_of_points(replay[points], sizes, report)
        report.write()
    for size in (sizes.small, sizes.large):
        images = (
            load_images(options.images, sizes.images, size)
            if options.images
            else smooth_images(sizes.images, size, seed)
        )
        for format in EXTENSIONS:
            shards = write_images(root / f"{format}-{size}", images, format)
            claims_of_images(shards, size, sizes, workers, report)
            if size == sizes.large and format != "jpeg":
                shares = waits(shards, replay[Points.renoised], sizes, workers)
                claim = f"{format} and replay points: waiting, with {workers} threads"
                report.add(Claim(claim, "% of a step", WAIT_BAR, shares, bound="at most", needs_cuda=False))
            report.write()


def main(argv: Sequence[str]) -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the result goes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether everything runs")
    parser.add_argument("--images", help="an .npz of real images")
    parser.add_argument("--repeats", type=int, default=Sizes.repeats)
    parser.add_argument("--seconds", type=float, default=Sizes.seconds, help="of each repeat")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes(repeats=options.repeats, seconds=options.seconds)
    report = Report(command_line("reader.py", argv), options.json, torch.cuda.is_available())
    report.versions = package_versions(("torch", "numpy", "pillow", "webdataset"))
    with tempfile.TemporaryDirectory(prefix="palimpsest-reader-") as directory:
        try:
            measure(options, sizes, Path(directory), report)
        except WrongResult as error:
            fail(error)
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
