"""The benchmark that attacks a run, for some seconds."""

from __future__ import annotations

import re
from pathlib import Path

import chaos
import psutil
import pytest
from attack.job import MARK, Job

from . import zygote
from .conftest import TASKS, Workplace

KINDS = (
    *("kill -9 rank", "SIGTERM", "kill -9 sampler", "shard bit flipped", "manifest torn"),
    *("checkpoint bit flipped", "full disk"),
)


class ForkedJob(Job):
    """The same command, started from a process that has imported everything."""

    def spawn(self) -> zygote.Job:
        return zygote.Job("train.py", self.arguments, Path.cwd(), self.log(), {MARK: self.mark})

    def members(self) -> list[psutil.Process]:
        """A fork keeps its mark where other processes cannot see it."""
        found = super().members()
        if self.process is not None and self.code is None:
            found.append(psutil.Process(self.process.pid))
        return found


@pytest.mark.timeout(630)
def test_attacked_run_ends_like_its_twin(
    workplace: Workplace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace.path)
    kinds = [word for kind in KINDS for word in ("--only", kind)]
    arguments = ["--config", "tiny.yaml", "--minutes", "10", "--seed", "1", "--ranks", "0", "--faults", "6", *kinds]
    longer = ["train.images_per_task=1536", "checkpoint.every_images=128", "evaluation.samples=48"]
    code = chaos.main([*arguments, TASKS, *longer], ForkedJob)
    output = capsys.readouterr().out
    assert code == 0, output
    verdict = re.match(r"chaos: same weights, nothing lost: (\d+) faults in ", output.splitlines()[-1])
    assert verdict, output
    assert int(verdict[1]) >= 3, output  # six, where the machine is not too slow for the minutes given
