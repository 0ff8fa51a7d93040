"""When the profiler records, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from trainer.config import Config
from trainer.profiling import StepProfiler
from trainer.run import RunDir
from trainer.tracking.tracker import Tracker
from trainer.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


class Notes(Tracker):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def run(path: Path, tasks: list[int], steps: int, start: int) -> list[str]:
    """What was said in an attempt with so many steps in each of its tasks."""
    config, notes = Config(), Notes()
    config.tracking.profile_steps, config.tracking.profile_start = steps, start
    profiler = StepProfiler(config, RunDir(path), ALONE, notes)
    for task in tasks:
        for _ in range(task):
            profiler.begin_step()
            torch.ones(3).exp()
            profiler.end_step()
        profiler.stop()
    profiler.close()
    return notes.lines


@pytest.mark.parametrize(
    ("tasks", "start", "steps"),
    [([9], 5, "5 to 6"), ([9], 1, "1 to 2"), ([7], 6, "6 to 6"), ([4, 9], 5, "7 to 8"), ([3, 9], 3, "6 to 7")],
)
def test_which_steps_are_recorded(tmp_path: Path, tasks: list[int], start: int, steps: str) -> None:
    """Two, from `start` on; fewer where the task ends; after a new warm-up where it ends before the first."""
    trace = tmp_path / "logs" / "attempt-0" / "profile-rank-0.json.gz"
    assert run(tmp_path, tasks, 2, start) == [
        f"profiled steps {steps} of this attempt (from 0): {trace}, profile-rank-0.txt"
    ]
    assert "aten::exp" in (trace.parent / "profile-rank-0.txt").read_text()


def test_a_short_attempt_says_that_nothing_was_recorded(tmp_path: Path) -> None:
    said = run(tmp_path, [4], 2, 20)
    assert said == ["tracking.profile_start=20: this attempt took 4 steps, none was recorded"]
    assert run(tmp_path, [4], 0, 20) == []
    assert not list(tmp_path.iterdir())


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "logs").write_text("in the way")
    assert run(tmp_path, [9], 2, 5) == []
    assert "profile-rank-0.json.gz" in capfd.readouterr().err
