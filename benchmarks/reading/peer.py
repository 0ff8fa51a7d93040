"""What people use: webdataset in torch's DataLoader with one worker, Pillow for images, numpy for arrays."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from webdataset.compat import WebDataset

SHUFFLE = 1000  # samples held for shuffling, as in webdataset's own examples


class Peer:
    """Batches without end, and the CPU time that they take in both processes."""

    def __init__(self, pipeline: Any, batch: int) -> None:
        loader: Any = DataLoader(pipeline.batched(batch, partial=False).repeat(), batch_size=None, num_workers=1)
        before = {child.pid for child in multiprocessing.active_children()}
        self.batches: Iterator[Any] = iter(loader)
        (self._worker,) = [child.pid for child in multiprocessing.active_children() if child.pid not in before]

    def cpu_seconds(self) -> float:
        times = psutil.Process(self._worker).cpu_times()
        return time.process_time() + times.user + times.system

    def close(self) -> None:
        """End the worker."""
        del self.batches


def read_images(paths: list[str], extension: str, batch: int) -> Peer:
    """Batches (uint8 (n,C,H,W), classes (n,)) of task shards, shuffled within a window."""
    pipeline: Any = WebDataset(paths, shardshuffle=len(paths))
    pipeline = pipeline.shuffle(SHUFFLE).decode("pil").to_tuple(extension, "cls")
    return Peer(pipeline.map_tuple(_as_tensor, int), batch)


def _as_tensor(image: Any) -> Tensor:
    if isinstance(image, np.ndarray):
        return torch.from_numpy(image)
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def read_points(paths: list[str], batch: int) -> Peer:
    """Batches (images, targets fp16, t, seeds, labels) of replay shards, shuffled within a window."""
    pipeline: Any = WebDataset(paths, shardshuffle=len(paths))
    return Peer(pipeline.decode().compose(_points).shuffle(SHUFFLE), batch)


def _points(samples: Iterable[dict[str, Any]]) -> Iterator[tuple[Tensor, Tensor, int, int, int]]:
    for sample in samples:
        record, targets = sample["json"], torch.from_numpy(sample["targets.npy"])
        images = torch.from_numpy(sample["end.npy"] if "end.npy" in sample else sample["states.npy"])
        for point, (t, seed) in enumerate(zip(record["timesteps"], record["seeds"], strict=True)):
            image = images if "end.npy" in sample else images[point]
            yield image, targets[point], t, seed, record["label"]
