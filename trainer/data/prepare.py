"""From a host batch to training pairs on the device: the way of one real image."""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.config import Prediction
from trainer.data.batch import Examples
from trainer.data.label_dropout import LabelDropout
from trainer.data.stream import HostBatch
from trainer.diffusion.schedules import NoiseSchedule
from trainer.kernels.noise import add_noise
from trainer.kernels.philox import timesteps, uniform
from trainer.seeds import derive


class Preparer:
    """Normalises, flips and noises uint8 images on the device.

    Timestep, noise and flip of an image, and whether its label is dropped, are a function of (run seed, purpose, its
    key, its epoch) alone. `purpose` keeps a buffer's draws apart from those of the current task.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        *,
        seed: int,
        purpose: str,
        flip: bool,
        device: torch.device,
        dtype: torch.dtype,
        label_dropout: LabelDropout | None = None,
    ) -> None:
        self.schedule = schedule.to(device)
        self.seed, self.purpose, self.flip = seed, purpose, flip
        self.device, self.dtype, self.label_dropout = device, dtype, label_dropout

    def __call__(self, batch: HostBatch) -> Examples:
        """Training pairs of a batch, shapes as in `Examples`."""
        t = timesteps(self._seeds(batch, "timestep"), self.schedule.timesteps)
        flip = uniform(self._seeds(batch, "flip"), 1)[:, 0] < 0.5 if self.flip else None
        x, target = add_noise(
            batch.images.to(self.device, non_blocking=True),
            self._seeds(batch, "noise"),
            t,
            self.schedule.signal,
            self.schedule.sigma,
            flip=flip,
            predict_v=self.schedule.prediction is Prediction.v,
            dtype=self.dtype,
        )
        label = batch.labels.to(self.device, non_blocking=True)
        if self.label_dropout is not None:
            label = self.label_dropout(label, f"{self.purpose}/label-dropout", batch.keys, batch.draws)
        return Examples(x, t, target, label)

    def _seeds(self, batch: HostBatch, use: str) -> Tensor:
        seeds = derive(self.seed, f"{self.purpose}/{use}", batch.keys, batch.draws)
        return torch.from_numpy(seeds).to(self.device, non_blocking=True)
