"""A buffer of real images as a source of replay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trainer.data.batch import Examples
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.replay.source import POOLLESS, ReadySource


class BufferSource(ReadySource):
    """Real images of earlier tasks, in an order of their own (`trainer.replay.source.ReplaySource`)."""

    def __init__(self, stream: Iterator[HostBatch], prepare: Preparer, batch: int, used: int = 0) -> None:
        """`batch` is over all ranks; `used` points were used in earlier attempts. The stream is not owned."""
        self.stream, self.prepare, self.batch, self.used = stream, prepare, batch, used

    def points(self, step: int, current: Examples | None = None) -> Examples:
        self.used += self.batch
        return self.prepare(next(self.stream))

    def stats(self) -> dict[str, Any]:
        return {**POOLLESS, "points_used": self.used}
