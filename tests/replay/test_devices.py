"""Samplers find the GPUs that the launcher hides from the trainer, and keep off those that a person hid."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.replay import devices
from trainer.replay.devices import VISIBLE, child_device, choose_devices, node_gpus, parse_device, visible_gpus
from trainer.replay.state import read_json
from trainer.replay.supervisor import Supervisor
from trainer.session import sidecar_device
from trainer.world import World


@pytest.fixture(autouse=True)
def counted_anew(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(VISIBLE, raising=False)
    devices._count_gpus.cache_clear()
    yield
    devices._count_gpus.cache_clear()


@pytest.mark.parametrize(("name", "index"), [("cpu", None), ("cuda", 0), ("cuda:0", 0), ("cuda:12", 12)])
def test_names(name: str, index: int | None) -> None:
    assert parse_device(name) == index


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:1 ", "CUDA:1", "cuda:1,2", "cpu:0", "cuda:\u0661"]
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=r"replay\.device="):
        parse_device(name)


@pytest.mark.parametrize(
    ("wanted", "workers", "trainers", "gpus", "visible", "expected"),
    [
        ("", 2, 1, 0, None, "cpu cpu"),
        ("", 1, 1, 1, None, "cuda:0"),
        ("", 2, 2, 2, None, "cuda:0 cuda:1"),  # none beyond the trainers': their own
        ("", 3, 2, 2, None, "cuda:0 cuda:1 cuda:0"),
        ("", 1, 1, 2, None, "cuda:1"),
        ("", 3, 2, 4, None, "cuda:2 cuda:3 cuda:2"),
        ("", 2, 1, 4, [0], "cuda:1 cuda:2"),  # deepspeed --num_gpus 1
        ("", 3, 2, 4, [0, 1], "cuda:2 cuda:3 cuda:2"),
        ("", 2, 1, 1, [0], "cuda:0 cuda:0"),
        ("", 1, 1, 4, [3], "cuda:3"),  # CUDA_VISIBLE_DEVICES=3: the others are not ours
        ("", 2, 2, 4, [2, 3], "cuda:2 cuda:3"),
        ("", 2, 1, 8, [4, 6, 7], "cuda:6 cuda:7"),
        ("", 1, 1, 4, [], "cpu"),
        ("cpu", 2, 1, 4, [0], "cpu cpu"),
        ("cpu", 1, 1, 0, None, "cpu"),
        ("cuda", 2, 1, 4, [0], "cuda:0 cuda:0"),
        ("cuda:3", 2, 1, 4, [0], "cuda:3 cuda:3"),
    ],
)
def test_choice(wanted: str, workers: int, trainers: int, gpus: int, visible: list[int] | None, expected: str) -> None:
    assert choose_devices(wanted, workers, trainers, gpus, visible) == expected.split()


@pytest.mark.parametrize(("wanted", "gpus", "word"), [("cuda:4", 4, "cuda:0 to cuda:3"), ("cuda", 0, "no CUDA")])
def test_a_gpu_that_the_node_lacks_is_refused(wanted: str, gpus: int, word: str) -> None:
    with pytest.raises(ConfigError, match=rf"replay\.device={wanted}: .*{word}"):
        choose_devices(wanted, 1, 1, gpus)


@pytest.mark.parametrize(
    ("value", "gpus"),
    [(None, None), ("", []), ("0", [0]), ("4,6, 7", [4, 6, 7]), ("GPU-8f,GPU-2c", None), ("MIG-1", None)],
)
def test_what_is_visible(value: str | None, gpus: list[int] | None) -> None:
    assert visible_gpus({} if value is None else {VISIBLE: value}) == gpus


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [
        ("cpu", "0", ("cpu", {})),
        ("cuda:1", "0", ("cuda:0", {VISIBLE: "1"})),
        ("cuda", None, ("cuda:0", {VISIBLE: "0"})),
        ("cuda:1", "GPU-8f,GPU-2c", ("cuda:0", {VISIBLE: "GPU-2c"})),
    ],
)
def test_how_a_child_reaches_it(device: str, visible: str | None, expected: tuple[str, dict[str, str]]) -> None:
    assert child_device(device, {} if visible is None else {VISIBLE: visible}) == expected


def make_driver(directory: Path) -> None:
    """The CUDA driver of a node with 5 GPUs; shows as many as CUDA_VISIBLE_DEVICES has characters."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    source = directory / "driver.c"
    source.write_text(
        "#include <stdlib.h>\n#include <string.h>\n"
        "static int ready;\n"
        "int cuInit(unsigned flags) { ready = 1; return flags != 0; }\n"
        "int cuDeviceGetCount(int *count) {\n"
        f'  const char *shown = getenv("{VISIBLE}");\n'
        "  *count = shown ? (int)strlen(shown) : 5;\n  return ready ? 0 : 3;\n}\n"
    )
    target = str(directory / "libcuda.so.1")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", target, str(source)], check=True, timeout=60)


@pytest.mark.parametrize(("visible", "gpus"), [(None, 5), ("0", 5), ("GPU-8f,GPU-2c", 2)])
def test_the_node_is_counted_past_what_the_launcher_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: int
) -> None:
    make_driver(tmp_path)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    assert node_gpus() == gpus


def test_without_a_driver_pytorch_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setattr(devices, "_COUNT", devices._COUNT.replace("libcuda.so.1", str(tmp_path / "libcuda.so.1")))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert node_gpus() == 3


@pytest.mark.parametrize(
    ("device", "visible", "expected"),
    [("cuda", "0", ["cuda:1", "cuda:2"]), ("cuda", "3", ["cuda:3", "cuda:3"]), ("cpu", None, ["cpu", "cpu"])],
)
def test_the_sidecars_of_a_trainer(
    monkeypatch: pytest.MonkeyPatch, device: str, visible: str | None, expected: list[str]
) -> None:
    monkeypatch.setattr("trainer.session.node_gpus", lambda: 3)
    monkeypatch.setenv("LOCAL_SIZE", "1")
    if visible is not None:
        monkeypatch.setenv(VISIBLE, visible)
    config, world = Config(), World(0, 1, 0, torch.device(device))
    config.replay.workers = 2
    assert [sidecar_device(config, world, worker) for worker in range(2)] == expected


@pytest.mark.parametrize(
    ("device", "inherit", "expected"),
    [("cuda:1", False, "1 cuda:0"), ("cpu", False, "0,7 cpu"), ("cuda:1", True, "0,7 cuda:1")],
)
def test_the_child_is_shown_its_device_alone(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, device: str, inherit: bool, expected: str
) -> None:
    seen = workplace.run.root / "seen"
    script = f"""
import os, pathlib, sys, time
text = os.environ[{VISIBLE!r}] + " " + sys.argv[sys.argv.index("--device") + 1]
part = pathlib.Path({str(seen)!r} + ".part")
part.write_text(text)
part.rename({str(seen)!r})
time.sleep(600)
"""
    command = Supervisor._command
    monkeypatch.setattr(Supervisor, "_command", lambda self: [sys.executable, "-S", "-c", script, *command(self)[3:]])
    monkeypatch.setenv(VISIBLE, "0,7")
    supervisor = Supervisor(workplace.run, worker=0, workers=1, device=device, inherit_devices=inherit)
    supervisor.start()
    try:
        deadline = time.monotonic() + 60
        while not seen.exists():
            assert time.monotonic() < deadline, "did not happen in time"
            time.sleep(0.02)
    finally:
        supervisor.stop()
    assert seen.read_text() == expected
    assert os.environ[VISIBLE] == "0,7" and read_json(workplace.run.supervisor(0))["device"] == device
