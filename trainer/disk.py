"""How much disk a run needs at once, at most."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import Config, OwnPoints
from trainer.replay.request import pools_disk_bytes
from trainer.steps import count_parameters

FP32 = 4


@dataclass(frozen=True)
class DiskNeed:
    """Bytes of one checkpoint and how many there may be (the end of each task, the newest of a running one, one to be
    pruned and one being written); of all teachers with their pipelines; of what penalties keep; of the replay pools."""

    checkpoint_bytes: int
    checkpoints: int
    teachers_bytes: int
    fisher_bytes: int
    replay_bytes: int

    @staticmethod
    def of(config: Config) -> DiskNeed:
        """Raises ConfigError for a pool that cannot be."""
        weights, tasks = FP32 * count_parameters(config), len(config.data.tasks)
        local = config.points is OwnPoints.labelled  # a second teacher of each task but the first
        return DiskNeed(
            checkpoint_bytes=(3 + (config.ema.decay > 0)) * weights,  # weights, two moments, EMA
            checkpoints=tasks + config.checkpoint.keep + 2,
            teachers_bytes=(2 * tasks + (tasks - 1 if local else 0)) * weights,
            fisher_bytes=(tasks - 1) * weights if config.needs_fisher else 0,
            replay_bytes=pools_disk_bytes(config),
        )

    @property
    def total(self) -> int:
        return self.checkpoints * self.checkpoint_bytes + self.teachers_bytes + self.fisher_bytes + self.replay_bytes
