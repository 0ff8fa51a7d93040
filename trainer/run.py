"""The run directory: every path in it is a function here, nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunDir:
    """`runs/<name>`; tasks count from 1."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def metrics_log(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        """The result; its presence with as many rows as tasks says that the run is finished."""
        return self.root / "metrics.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def state(self) -> Path:
        """What the trainer is doing now, for sidecars and people: `{"task", "finished"}`."""
        return self.root / "state.json"

    @property
    def report(self) -> Path:
        return self.root / "report"

    def log(self, attempt: int) -> Path:
        return self.root / "logs" / f"attempt-{attempt}"

    def task(self, task: int) -> Path:
        return self.root / "tasks" / str(task)

    def teacher(self, task: int) -> Path:
        """The frozen model learnt up to and including `task`: model.safetensors and card.json."""
        return self.task(task) / "teacher"

    def pipeline(self, task: int) -> Path:
        """The same model as a diffusers pipeline."""
        return self.task(task) / "pipeline"

    def checkpoints(self, task: int) -> Path:
        return self.task(task) / "checkpoints"

    def replay(self, task: int) -> Path:
        """The replay pool consumed while learning `task`, made by the teacher of `task - 1`."""
        return self.task(task) / "replay"

    def buffer(self, task: int) -> Path:
        """Real images of `task` kept for experience replay."""
        return self.task(task) / "buffer"

    def evaluation(self, task: int) -> Path:
        """The measures after `task`."""
        return self.task(task) / "evaluation.json"

    def samples(self, task: int) -> Path:
        return self.task(task) / "samples.png"
