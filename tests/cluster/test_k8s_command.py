"""The commands of the Kubernetes manifests, run: trainer pods on two hosts, a sidecar, one pod terminated, all resumed.

A pod is a process with process ids of its own on one of the hosts: the manifest's command is process 1 of it, as in a
container. What a cluster brings is replaced: mount paths by directories, the service's name by a line in /etc/hosts,
GPUs by one CPU rank in each pod, the data set by the digits, and the recipe's sizes by those of SETTINGS.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import ADDRESSES, TwoHosts, lacking, two_hosts
from tests.cluster.manifests import SIDECAR, TRAINER, Job, named
from trainer.container import UNFINISHED
from trainer.position import checkpoints
from trainer.run import RunDir
from trainer.tracking.log import read_log

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 900  # for any step of the test, on a machine that is busy
STEPS = 120  # of each task; quick machines, too, must have some left once the pod is told to end
TASKS = [[0, 1], [2, 3]]
SETTINGS: dict[str, Any] = {
    "data": {"name": "digits", "source": "digits", "classes": 10, "image_size": 8, "channels": 1, "tasks": TASKS},
    "model": {"channels": [8, 8], "norm_groups": 4},
    "train": {"images_per_task": STEPS * 16, "global_batch": 16, "log_every": 2, "threads": 1},
    "replay": {"steps": 3, "points_per_trajectory": 4, "shard_trajectories": 16, "sampler_batch": 16},
    "evaluation": {"samples": 48, "steps": 3, "classifier_epochs": 1, "grid_per_class": 2},
    "checkpoint": {"every_images": 64},
}
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(4 * SECONDS),
    pytest.mark.skipif(lacking() is not None, reason=lacking() or ""),
]


@dataclass
class Pods:
    """The pods of one attempt, and the directories that stand for the volumes."""

    hosts: TwoHosts
    place: Path
    logs: dict[str, Path] = field(default_factory=dict)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, attempt: int) -> None:
        for host, job, index in (("node1", TRAINER, 0), ("node2", TRAINER, 1), ("node2", SIDECAR, 0)):
            name = f"{job.name}-{index}"
            self.logs[name] = self.place / f"{name}-attempt-{attempt}.log"
            self.running[name] = self.hosts.start(host, self.words(job, index), self.logs[name], cwd=ROOT)

    def words(self, job: Job, index: int) -> str:
        """A shell command that is the pod: process ids of its own, the manifest's command as the first of them."""
        own = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        return shlex.join([*own, *self.environment(job, index), *(self.here(word) for word in job.command(index))])

    def probe(self, job: Job, index: int, kind: str) -> list[str]:
        """The probe's command, in the pod's environment."""
        words: list[str] = job.container[kind]["exec"]["command"]
        return [*self.environment(job, index), *words]

    def environment(self, job: Job, index: int) -> list[str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        own = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        given = {name: self.here(value) for name, value in job.environment(index).items()}
        return ["env", "-i", *(f"{name}={value}" for name, value in (own | given).items())]

    def here(self, word: str) -> str:
        """A word of the manifest, as it has to be on this machine."""
        places = {"/etc/palimpsest": "hosts", "/palimpsest/runs": "runs", "/palimpsest/data": "data"}
        for path, name in places.items():
            word = word.replace(path, str(self.place / name))
        exchanged = {
            "--config=imagenet100.yaml": f"--config={self.place / 'digits.yaml'}",
            "--device=cuda": "--device=cpu",
            "--workers=2": "--workers=1",
            "--threads=4": "--threads=1",
            "/tmp": str(self.place / "tmp"),
        }
        key = word.partition("=")[0]
        section, _, name = key.partition(".")
        if name in SETTINGS.get(section, {}):
            return f"{key}={SETTINGS[section][name]}"
        return exchanged.get(word, word)

    def end(self) -> dict[str, int]:
        """The exit codes, once all pods have ended by themselves."""
        deadline = time.monotonic() + SECONDS
        codes = {name: process.wait(max(0.1, deadline - time.monotonic())) for name, process in self.running.items()}
        assert not any(self.hosts.processes(host, "launch/t") for host in ("node1", "node2")), "nothing is left"
        return codes

    def said(self, name: str) -> str:
        return self.logs[name].read_text(errors="replace")

    def first_process(self, host: str, script: str) -> int:
        """The host's number of the process that is number 1 in its pod, of the pod that runs a script."""
        rows = self.hosts.run(host, "ps -e -o pid= -o args=").splitlines()
        found = [row.split(None, 1) for row in rows if "launch/container.py" in row and script in row]
        (pid,) = [int(pid) for pid, line in found if line.startswith("python ")]
        return pid


@pytest.fixture
def pods(tmp_path: Path) -> Generator[Pods, None, None]:
    for name in ("hosts", "runs", "data", "tmp"):
        (tmp_path / name).mkdir()
    settings = SETTINGS | {"run": {"dir": str(tmp_path / "runs")}}
    settings["data"] = SETTINGS["data"] | {"root": str(tmp_path / "data" / "digits")}
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(settings))
    hostfile: str = named("ConfigMap", "palimpsest-hosts")["data"]["hostfile"]
    (tmp_path / "hosts" / "hostfile").write_text(hostfile.replace("slots=8", "slots=1"))
    with two_hosts(tmp_path / "net") as hosts:
        for host in ("node1", "node2"):
            line = f"{ADDRESSES['node1']} palimpsest-trainer-0.palimpsest"
            hosts.run(host, f"echo {line} >> /etc/hosts")
        yield Pods(hosts, tmp_path)


def wait_until(pods: Pods, happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not happened():
        ended = [name for name, process in pods.running.items() if process.poll() is not None]
        assert not ended, f"{ended}: {pods.said(ended[0])[-3000:]}"
        assert time.monotonic() < deadline, f"it did not happen: {pods.said(f'{TRAINER.name}-0')[-3000:]}"
        time.sleep(0.2)


def test_pods_train_are_terminated_resume_and_finish(pods: Pods) -> None:
    run = RunDir(pods.place / "runs" / "imagenet100")
    pods.start(1)
    wait_until(pods, lambda: bool(checkpoints(run, 2)) and run.sampler(0).exists())
    for host, job in (("node1", TRAINER), ("node2", TRAINER), ("node2", SIDECAR)):
        for kind in ("startupProbe", "livenessProbe"):
            pods.hosts.run(host, f"cd {ROOT} && {shlex.join(pods.probe(job, 0, kind))}")  # raises where it is not 0
    wait_until(pods, lambda: next(iter(checkpoints(run, 2)), (0, 0)) >= (2, 4))
    pods.hosts.run("node2", f"kill -TERM {pods.first_process('node2', 'launch/train.py')}")
    codes = pods.end()
    assert not run.metrics.exists(), "too late: the run had ended"
    told = pods.said(f"{TRAINER.name}-0")
    assert "stopped and saved in task 2 after" in told, told[-3000:]
    # That of pod 0, too, whose ranks ended well although nobody had told them to stop: it must be started again.
    assert set(codes.values()) == {UNFINISHED}, codes

    pods.start(2)
    codes = pods.end()
    assert set(codes.values()) == {0}, (codes, pods.said(f"{TRAINER.name}-0")[-3000:])
    result = json.loads(run.metrics.read_text())
    assert result["tasks"] == len(TASKS)
    assert result["cost"]["replay_points_used"] == STEPS * 16, "the sidecar's"
    begun = [
        (line["task"], line["seen"], line["ranks"]) for line in read_log(run.metrics_log) if line["event"] == "task"
    ]
    assert begun[:2] == [(1, 0, 2), (2, 0, 2)]
    task, seen, ranks = begun[2]
    assert (task, ranks) == (2, 2)
    assert 64 <= seen < STEPS * 16, "it went on where it was stopped"
