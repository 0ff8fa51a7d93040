"""The keys of the images that a rank took, over two attempts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.data.stream import RealStream
from trainer.run import RunDir
from trainer.seeds import hash_keys
from trainer.tracking.trace import trace_samples
from trainer.world import World


@dataclass
class Numbered:
    """Images that hold their own number."""

    count: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 1, 1, 1

    @property
    def sample_keys(self) -> list[str]:
        return [f"image-{number}" for number in range(self.count)]

    @property
    def keys(self) -> np.ndarray:
        return hash_keys(f"train/1/{key}" for key in self.sample_keys)

    @property
    def labels(self) -> np.ndarray:
        return np.zeros(self.count, dtype=np.int64)

    def __len__(self) -> int:
        return self.count

    def read_into(self, indices: np.ndarray, images: np.ndarray) -> None:
        images[:] = indices.astype(np.uint8).reshape(-1, 1, 1, 1)


def test_lines_name_what_the_batches_hold(tmp_path: Path) -> None:
    run, data = RunDir(tmp_path), Numbered(10)
    world = World(0, 1, 0, torch.device("cpu"))
    taken: dict[int, list[list[str]]] = {}
    for attempt, steps in ((9, (0, 5)), (10, (3, 7))):
        run.log(attempt).mkdir(parents=True)
        taken[attempt] = []
        with RealStream(
            data, seed=0, task=4, global_batch=4, rank=0, world_size=1, start_step=steps[0], stop_step=steps[1],
            workers=1, prefetch=2,
        ) as stream:  # fmt: skip
            for batch in trace_samples(stream, data, run, world, 4, steps[0]):
                taken[attempt].append([f"image-{int(image)}" for image in batch.images.flatten()])
    for attempt, first in ((9, 0), (10, 3)):
        lines = [json.loads(line) for line in run.seen_samples(attempt, 0).read_text().splitlines()]
        assert [line["task"] for line in lines] == [4] * len(taken[attempt])
        assert [line["step"] for line in lines] == list(range(first, first + len(lines)))
        assert [line["keys"] for line in lines] == taken[attempt]
    assert taken[9][3:] == taken[10][:2]


def test_a_line_is_written_before_its_batch_is_used(tmp_path: Path) -> None:
    """So whatever a killed run has learnt from stands there."""
    run, data = RunDir(tmp_path), Numbered(4)
    run.log(1).mkdir(parents=True)
    with RealStream(
        data, seed=0, task=1, global_batch=2, rank=0, world_size=1, start_step=0, stop_step=2, workers=1, prefetch=1
    ) as stream:
        batches = trace_samples(stream, data, run, World(0, 1, 0, torch.device("cpu")), 1, 0)
        for count, _ in enumerate(batches, 1):
            assert len(run.seen_samples(1, 0).read_text().splitlines()) == count
