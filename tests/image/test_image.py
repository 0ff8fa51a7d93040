"""The image, built for real: what is in it, the digits job within it as its user, its health, its stop, its rebuild."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from tests.image.images import BUILD_SECONDS, ROOT, Built, build, lacking, pip_options, podman
from trainer.container import UNFINISHED
from trainer.run import RunDir

TAG = "localhost/palimpsest:test"
SECONDS = 900  # for the job, on a machine that is busy
USER = 1000
CONTEXT = (
    "Dockerfile",
    ".dockerignore",
    "pyproject.toml",
    "constraints.txt",
    "trainer",
    "data_tools",
    "launch",
    "configs",
)
# The demo's job, shortened: two of its five tasks, fewer images.
JOB = ["deepspeed", "--num_gpus", "2", "launch/train.py", "--config", "digits.yaml", "run.name=demo"]
SHORT = ["data.tasks=[[0,1],[2,3]]", "train.images_per_task=9600", "checkpoint.every_images=640"]
SHORT += ["evaluation.samples=200", "tracking.progress=false"]
REASON = lacking()
pytestmark = [
    pytest.mark.image,
    pytest.mark.timeout(BUILD_SECONDS + 3 * SECONDS),
    pytest.mark.skipif(REASON is not None, reason=REASON or ""),
]


@pytest.fixture(scope="module")
def image() -> Built:
    return build(ROOT, TAG)


@pytest.fixture(scope="module")
def settings(image: Built) -> dict[str, Any]:
    """What podman says of the image, but for where it keeps its layers on this machine."""
    (found,) = json.loads(podman("image", "inspect", image.tag).stdout)
    del found["GraphDriver"]
    return found


class Container:
    """The image at work on directories of this machine, all else read-only."""

    def __init__(self, name: str, place: Path, *words: str) -> None:
        self.name = name
        for volume in ("runs", "data"):
            (place / volume).mkdir(exist_ok=True)
            shutil.chown(place / volume, USER, USER)
        volumes = [f"--volume={place / volume}:/palimpsest/{volume}" for volume in ("runs", "data")]
        how = ["--read-only", "--tmpfs=/tmp:rw,mode=1777", "--cap-drop=all", "--security-opt=no-new-privileges"]
        own = ["--network=host", "--health-interval=disable", "--env=PALIMPSEST_RUN=/palimpsest/runs/demo"]
        own += ["--env=HOME=/tmp", "--env=OMP_NUM_THREADS=1"]
        podman("run", "--detach", f"--name={name}", *how, *own, *volumes, TAG, *words)

    def check(self, test: list[str]) -> tuple[int, str]:
        """What the image's health check says now."""
        assert test[0] == "CMD"
        done = podman("exec", self.name, *test[1:], check=False)
        return done.returncode, done.stdout + done.stderr

    def running(self) -> bool:
        return podman("inspect", "--format={{.State.Running}}", self.name).stdout.strip() == "true"

    def wait(self) -> int:
        """The exit code."""
        return int(podman("wait", self.name, timeout=SECONDS).stdout)

    def said(self) -> str:
        done = podman("logs", self.name, check=False)
        return done.stdout + done.stderr

    def remove(self) -> None:
        podman("rm", "--force", "--time=1", self.name, check=False)


@pytest.fixture
def place(tmp_path: Path) -> Generator[Path, None, None]:
    yield tmp_path
    for name in ("palimpsest-first", "palimpsest-second"):
        podman("rm", "--force", "--time=1", name, check=False)


def test_linters_find_nothing() -> None:
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_nothing_of_this_machine_stays_in_the_image(image: Built, settings: dict[str, Any]) -> None:
    told = json.dumps(settings) + podman("history", "--no-trunc", "--format=json", image.tag).stdout
    words = {word for value in pip_options().values() for word in value.split() if "/" in word}
    assert [word for word in (*words, str(ROOT)) if word in told] == []
    looks = "cat /etc/pip.conf ~/.config/pip/pip.conf; ls -A /run/secrets; find / -xdev -name 'pip.conf' -size +0"
    left = podman("run", "--rm", "--network=none", "--entrypoint=sh", image.tag, "-c", looks, check=False)
    assert left.stdout == ""
    holds = podman("run", "--rm", "--network=none", "--entrypoint=ls", image.tag, "-A", "/palimpsest").stdout.split()
    assert holds == ["configs", "data", "data_tools", "launch", "runs", "trainer"]


def test_the_user_is_not_root_and_cannot_change_the_program(image: Built, settings: dict[str, Any]) -> None:
    assert settings["Config"]["User"] == f"{USER}:{USER}"
    looks = "id -u; for path in trainer launch /opt/venv; do test ! -w $path || echo $path; done; command -v gcc"
    said = podman("run", "--rm", "--network=none", "--entrypoint=sh", image.tag, "-c", looks).stdout.split()
    assert said == [str(USER), "/usr/bin/gcc"]
    absent = "command -v g++ || command -v make || command -v ssh || command -v pdsh"
    assert podman("run", "--rm", "--entrypoint=sh", image.tag, "-c", absent, check=False).returncode != 0


def test_the_job_runs_is_stopped_and_goes_on(image: Built, settings: dict[str, Any], place: Path) -> None:
    check = settings["Healthcheck"]["Test"]
    run = RunDir(place / "runs" / "demo")
    first = Container("palimpsest-first", place, *JOB, *SHORT)
    code, why = first.check(check)
    assert (code, why[:15]) == (1, "no progress yet")
    deadline = time.monotonic() + SECONDS
    while not any(run.checkpoints(2).glob("step-*")):
        assert first.running() and time.monotonic() < deadline, first.said()[-3000:]
        time.sleep(0.5)
    code, why = first.check(check)
    assert code == 0, why
    podman("stop", "--time=300", first.name)
    assert first.wait() == UNFINISHED, first.said()[-3000:]
    assert "stopped and saved in task 2" in first.said()
    assert not run.metrics.exists()
    first.remove()

    second = Container("palimpsest-second", place, *JOB, *SHORT)
    assert second.wait() == 0, second.said()[-3000:]
    assert json.loads(run.metrics.read_text())["tasks"] == 2
    assert {path.stat().st_uid for path in (run.metrics, run.report_page)} == {USER}
    second.remove()


def test_another_source_installs_nothing(image: Built, tmp_path: Path) -> None:
    context = tmp_path / "context"
    context.mkdir()
    for name in CONTEXT:
        source = ROOT / name
        copy = shutil.copytree if source.is_dir() else shutil.copy2
        copy(source, context / name)
    with (context / "trainer" / "__init__.py").open("a") as file:
        file.write("\n# another line\n")
    pyproject = (context / "pyproject.toml").read_text()
    (context / "pyproject.toml").write_text(pyproject.replace("line-length = 120", "line-length = 110"))
    again = build(context, TAG + "-again")
    print(f"built in {image.seconds:.0f} s, after a change of the source in {again.seconds:.0f} s")
    assert "Successfully installed" not in again.log
    layers = [json.loads(podman("image", "inspect", tag).stdout)[0]["RootFS"]["Layers"] for tag in (TAG, again.tag)]
    shared = sum(one == other for one, other in zip(*layers, strict=True))
    assert shared >= len(layers[0]) - 4, "all layers but the four of the source"
    assert layers[0] != layers[1]
    podman("rmi", again.tag)
