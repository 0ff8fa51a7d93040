"""Plans against the ZeRO paper's numbers, torch's own optimiser and sums done by hand."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trainer import plan as planning
from trainer.cli import run_main
from trainer.config import Config, EmaConfig, Placement, Precision, TrainConfig, ZeroConfig
from trainer.errors import ConfigError
from trainer.memory import state_bytes
from trainer.models.denoiser import build_denoiser
from trainer.plan import make_plan, rich_plan, size
from trainer.settings import load_config
from trainer.steps import count_parameters

ROOT = Path(planning.__file__).resolve().parent.parent


def digits(*overrides: str) -> Config:
    return load_config("digits.yaml", list(overrides))


def with_zero(stage: int, precision: Precision, decay: float = 0.0) -> Config:
    return Config(zero=ZeroConfig(stage), train=TrainConfig(precision=precision), ema=EmaConfig(decay))


@pytest.mark.parametrize(("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.88)])
def test_memory_is_that_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters, 64 devices, mixed precision, Adam."""
    memory = state_bytes(7_500_000_000, with_zero(stage, Precision.bf16), 64)
    del memory["gradients in fp32"]  # of the step itself; the paper does not count them
    assert sum(memory.values()) / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_memory_without_zero_is_what_adam_holds() -> None:
    model = torch.nn.Linear(30, 20)
    adam = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 30)).sum().backward()
    adam.step()
    held = [t for p in model.parameters() for t in (p, p.grad, *adam.state[p].values()) if t is not None and t.dim()]
    memory = state_bytes(620, with_zero(0, Precision.fp32), 1)
    assert sum(memory.values()) == sum(t.nbytes for t in held)


def test_an_ema_is_one_more_fp32_copy_shared_like_the_moments() -> None:
    for stage, expected in ((0, 4000), (1, 1000), (3, 1000)):
        memory = state_bytes(1000, with_zero(stage, Precision.fp32, decay=0.999), 4)
        assert memory["EMA"] == expected == memory["moments"] // 2


@pytest.mark.parametrize("conditional", [True, False])
def test_parameters_are_those_of_the_model_that_is_built(conditional: bool) -> None:
    config = digits(f"model.conditional={conditional}".lower(), "model.channels=[8,16]")
    model = build_denoiser(config.model, image_size=8, channels=1, max_classes=10)
    weights = torch.nn.utils.parameters_to_vector(model.parameters())
    assert count_parameters(config) == weights.numel()


def test_steps_and_teacher_evaluations_by_hand() -> None:
    config = digits("train.images_per_task=1000", "train.global_batch=32", "replay.batch=48", "replay.steps=7")
    config.replay.points_per_trajectory, config.replay.shard_trajectories = 5, 10
    plan = make_plan(config, launched=1, gpus=0)
    assert [task.classes for task in plan.tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    first, *others = plan.tasks
    assert (first.steps, first.images, first.replay_points, first.teacher_evaluations) == (32, 1024, 0, 0)
    for task in others:
        assert task.replay_points == 32 * 48
        assert task.trajectories == 310  # 1536 points of 50 in a shard: 31 shards of 10 trajectories
        assert task.teacher_evaluations == 310 * (7 + 5)
        assert 0 < task.replay_disk_bytes <= task.replay_bytes
    assert plan.replay_points_per_step == 48 and plan.images_per_step == 32


def test_disk_by_hand() -> None:
    config = digits("method.name=finetune", "ema.decay=0.9", "checkpoint.keep=3")
    disk = make_plan(config, launched=1, gpus=0).disk
    weights = 4 * count_parameters(config)
    assert disk.checkpoint_bytes == 4 * weights  # weights, two moments, EMA
    assert disk.checkpoints == 5 + 3 + 2
    assert disk.teachers_bytes == 5 * 2 * weights
    assert disk.total == 10 * 4 * weights + 5 * 2 * weights


@pytest.mark.parametrize(("retirement", "pools"), [("delete", max), ("keep", sum)])
def test_disk_of_replay_pools(retirement: str, pools: Callable[[list[int]], int]) -> None:
    plan = make_plan(digits(f"replay.retirement={retirement}", "replay.pool_gb=1"), launched=1, gpus=0)
    assert plan.disk.replay_bytes == pools([task.replay_disk_bytes for task in plan.tasks]) > 0


@pytest.mark.parametrize(
    ("overrides", "launched", "gpus", "expected"),
    [
        (["method.name=finetune"], 2, 0, [("trainer", 2, ["cpu", "cpu"])]),
        (["method.name=finetune", "replay.placement=ranks"], 2, 0, [("trainer", 2, ["cpu", "cpu"])]),
        (["replay.placement=inline"], 1, 1, [("trainer", 1, ["cuda:0"])]),
        (
            ["replay.placement=ranks", "replay.devices_per_node=2"],
            4,
            4,
            [("trainer", 2, ["cuda:0", "cuda:1"]), ("teacher", 2, ["cuda:2", "cuda:3"])],
        ),
        (
            ["replay.placement=subprocess", "replay.device=cuda:1", "replay.workers=2"],
            1,
            2,
            [("trainer", 1, ["cuda:0"]), ("teacher", 2, ["cuda:1", "cuda:1"])],
        ),
        (["replay.workers=2"], 1, 2, [("trainer", 1, ["cuda:0"]), ("teacher", 2, ["cuda:1", "cuda:1"])]),
        (
            ["replay.workers=3"],
            2,
            4,
            [("trainer", 2, ["cuda:0", "cuda:1"]), ("teacher", 3, ["cuda:2", "cuda:3", "cuda:2"])],
        ),
        (
            ["replay.workers=3"],
            2,
            2,
            [("trainer", 2, ["cuda:0", "cuda:1"]), ("teacher", 3, ["cuda:0", "cuda:1", "cuda:0"])],
        ),
        (["data.tasks=[[0,1]]"], 1, 0, [("trainer", 1, ["cpu"])]),
    ],
)
def test_processes_by_placement(overrides: list[str], launched: int, gpus: int, expected: list[Any]) -> None:
    plan = make_plan(digits(*overrides), launched, gpus)
    assert [(p.role, p.count, p.devices) for p in plan.processes] == expected
    assert plan.trainers == expected[0][1]


def test_an_external_teacher_is_started_by_hand() -> None:
    teacher = make_plan(digits("replay.placement=external"), 1, 0).processes[1]
    assert "launch/teacher.py" in teacher.starter


def test_only_inline_replay_puts_the_teacher_on_the_trainers_device() -> None:
    inline = make_plan(digits("replay.placement=inline"), 1, 0)
    beside = make_plan(digits(), 1, 0)
    assert inline.memory["teacher"] == beside.sampler_memory == 4 * inline.parameters
    assert inline.sampler_memory == 0 and "teacher" not in beside.memory
    assert inline.memory_total == beside.memory_total + beside.sampler_memory


@pytest.mark.parametrize(
    ("overrides", "launched", "gpus", "named"),
    [
        (["replay.placement=ranks"], 1, 0, r"replay\.devices_per_node"),
        (["train.global_batch=65"], 2, 0, r"train\.global_batch"),
        (["train.precision=fp16"], 1, 0, r"train\.precision"),
        (["replay.device=cuda:0"], 1, 0, r"replay\.device"),
        (["replay.device=cuda:2"], 1, 2, r"replay\.device=cuda:2: .*cuda:0 to cuda:1"),
        (["replay.device=gpu1"], 1, 2, r"replay\.device=gpu1"),
        (["replay.pool_gb=0.0001"], 1, 0, r"replay\.pool_gb"),
        ([], 3, 2, "--num_gpus"),
    ],
)
def test_what_training_refuses_is_refused(overrides: list[str], launched: int, gpus: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_plan(digits(*overrides), launched, gpus)


def test_the_printed_plan_has_the_numbers() -> None:
    plan = make_plan(digits(), 1, 0)
    console = Console(record=True, width=140, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    console.print(rich_plan(plan))
    text = console.export_text()
    assert f"{plan.parameters:,} parameters" in text and f"{plan.tasks[1].teacher_evaluations:,}" in text
    assert size(plan.disk.total) in text and "runs/digits-generative_distillation" in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (2_540_000, "2.54 MB"), (10**13, "10 TB")]
)
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_the_entry_point_from_any_directory(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "plan.py"), "--config", "digits.yaml", "--num_gpus", "1", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, "run.name=x"], cwd=tmp_path, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["run_directory"] == "runs/x" and content["memory_total"] == sum(content["memory"].values())
    assert list(tmp_path.iterdir()) == [], "a plan starts and writes nothing"


def test_the_entry_point_refuses_with_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main = runpy.run_path(str(ROOT / "launch" / "plan.py"))["main"]
    monkeypatch.setattr("sys.argv", ["plan.py", "--config", "digits.yaml", "data.clases=3"])
    with pytest.raises(SystemExit) as caught:
        run_main(main)
    output = capsys.readouterr()
    assert caught.value.code == 2 and output.out == ""
    assert output.err.startswith("error: ") and "data.clases" in output.err and output.err.count("\n") == 1


def test_configs_that_ship_can_be_planned() -> None:
    for path in (ROOT / "configs").glob("*.yaml"):
        config = load_config(str(path), ["train.images_per_task=10000", "checkpoint.every_images=1000"])
        devices = 8 + (config.replay.devices_per_node if config.replay.placement is Placement.ranks else 0)
        plan = make_plan(config, devices, devices)
        assert plan.trainers == 8
        assert plan.parameters > 100_000 and len(plan.tasks) == len(config.data.tasks)
