"""kill -9 of all or one of a job's processes, for other methods, ZeRO stages and precisions: the same weights."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from .conftest import TASKS, Workplace, wait_until_published

Launcher = Callable[[int], tuple[str, ...]]

# Pairwise over method, ZeRO stage, precision and victim.
CASES = [
    ("generative_distillation", 2, "bf16", "all"),
    ("generative_replay", 3, "fp32", "rank"),
    ("experience_replay", 1, "bf16", "launcher"),
    ("joint", 0, "fp32", "all"),
    ("finetune", 3, "bf16", "rank"),
    ("generative_distillation", 0, "fp32", "launcher"),
    ("generative_replay", 1, "fp32", "all"),
    ("experience_replay", 2, "fp32", "rank"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("method", "stage", "precision", "victim"), CASES)
def test_two_ranks_killed_end_with_the_same_weights(
    workplace: Workplace, deepspeed: Launcher, method: str, stage: int, precision: str, victim: str
) -> None:
    settings = (TASKS, f"method.name={method}", f"zero.stage={stage}", f"train.precision={precision}")
    name = f"{method}-{stage}-{precision}"
    code, output = workplace.run(f"run.name={name}", *settings, launcher=deepspeed(2))
    assert code == 0, output

    process = workplace.start(f"run.name={name}-killed", *settings, launcher=deepspeed(2))
    run = workplace.path / "runs" / f"{name}-killed"
    wait_until_published(run / "tasks/2/checkpoints/step-00000004", process)
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family if victim == "all" else [pick(family, victim)]:
        with suppress(psutil.NoSuchProcess):
            member.send_signal(signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=60)
    process.communicate()
    assert not alive, "orphans"

    code, output = workplace.run(f"run.name={name}-killed", *settings, launcher=deepspeed(2))
    assert code == 0, output
    for task in (1, 2):
        assert workplace.teacher_id(f"{name}-killed", task) == workplace.teacher_id(name, task)


def pick(family: list[psutil.Process], victim: str) -> psutil.Process:
    """The second trainer rank, or deepspeed's launcher, the parent of the ranks."""
    sign = {"rank": "--local_rank=1", "launcher": "deepspeed.launcher.launch"}[victim]
    return next(member for member in family if sign in " ".join(member.cmdline()))
