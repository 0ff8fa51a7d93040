"""Teacher devices against sums done by hand; rates read from a run directory made by hand."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console

from trainer.config import Config
from trainer.errors import UserError
from trainer.plan import Plan, as_json, make_plan, rich_plan, with_supply
from trainer.rates import Rates, make_supply, measure_rates, rates_of_run
from trainer.replay.manifest import Manifest, ShardLine, new_id
from trainer.run import RunDir
from trainer.settings import as_plain, load_config


def digits(*overrides: str) -> Config:
    pool = [] if "replay.placement=inline" in overrides else ["replay.points_per_trajectory=10"]
    return load_config("digits.yaml", [*pool, *overrides])


def rates(images: float, evaluations: float) -> Rates:
    return Rates(images, None, evaluations, "by hand")


# --- arithmetic -------------------------------------------------------------------------------------------------

GUIDED = ("replay.guidance=2", "model.label_dropout=0.1")
STORED = ("replay.steps=7", "replay.points_per_trajectory=5", "replay.reuse=2", "replay.shard_trajectories=10")
BATCHES = ("train.global_batch=32", "replay.batch=48")


def test_devices_by_hand() -> None:
    """100 images/s take 150 points/s; a trajectory has 7 x 2 + 5 evaluations for 5 x 2 points: 285 evaluations/s."""
    config = digits(*GUIDED, *STORED, *BATCHES)
    supply = make_supply(config, rates(100, 1140), trainers=8, teachers=1)
    assert supply.points_per_second == pytest.approx(150)
    assert supply.evaluations_per_point == pytest.approx(1.9)
    assert supply.teacher_devices_per_trainer_device == pytest.approx(0.25)
    assert (supply.teacher_devices_needed, supply.teacher_utilisation) == (2, pytest.approx(1.0))
    assert supply.replay_share == pytest.approx(0.5) and supply.wait_share == pytest.approx(0.5)
    assert supply.first_shard_seconds == pytest.approx(10 * 19 / 1140)  # one shard serves 100 points, a step takes 48
    assert supply.inline_step_factor is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("replay.points=renoised",), (7 + 5) / 10),  # each end point is noised and labelled five times
        (("replay.points=trajectory",), 7 / 10),
        (("method.name=generative_replay",), 7 / 10),  # the noise is the target: nothing is labelled
        (("replay.points=trajectory", *GUIDED), 14 / 10),
    ],
)
def test_evaluations_per_point_by_hand(overrides: tuple[str, ...], expected: float) -> None:
    supply = make_supply(digits(*STORED, *overrides), rates(1, 1), trainers=1, teachers=1)
    assert supply.evaluations_per_point == pytest.approx(expected)


def test_headroom_and_part_of_a_device() -> None:
    """10 images/s take 20 evaluations/s on each of 3 trainers; 2 teachers make 80."""
    supply = make_supply(digits(), rates(10, 40), trainers=3, teachers=2)
    assert (supply.teacher_devices_needed, supply.teacher_utilisation) == (2, pytest.approx(60 / 80))
    assert supply.replay_share == pytest.approx(80 / 60) and supply.wait_share == 0


def test_no_device_more_for_a_rounding_error() -> None:
    supply = make_supply(digits(), rates(14, 400), trainers=100, teachers=7)
    assert 100 * (14 * 2 / 400) > 7, "in floating point"
    assert supply.teacher_devices_needed == 7


def test_a_first_step_that_takes_several_shards() -> None:
    """Points of 3 shards of 20 for 48; two teachers make them in two rounds, 2 trajectories of 12 evaluations each."""
    config = digits(*STORED, *BATCHES, "replay.shard_trajectories=2")
    supply = make_supply(config, rates(1, 6), trainers=1, teachers=2)
    assert supply.first_shard_seconds == pytest.approx(2 * (2 * 12 / 6))


def test_inline_replay_makes_a_step_longer() -> None:
    """10 images/s, 11 evaluations for each point: half a second of sampling for each second of training."""
    supply = make_supply(digits("replay.placement=inline"), rates(10, 220), trainers=4, teachers=0)
    assert supply.inline_step_factor == pytest.approx(1.5)
    assert supply.teacher_devices_needed is None and supply.wait_share is None


# --- an earlier run ---------------------------------------------------------------------------------------------


def line(event: str, **content: Any) -> dict[str, Any]:
    return {"time": 0.0, "event": event, **content}


def task_line(task: int, **machine: Any) -> dict[str, Any]:
    return line("task", task=task, seen=0, **({"device": "cpu", "device_name": "CPU, 1 thread", "ranks": 2} | machine))


def train_line(task: int, seen: int, rate: float, waited: float = 0.0) -> dict[str, Any]:
    return line("train", task=task, seen=seen, images_per_second=rate, replay_wait_seconds=waited)


LOG = [
    task_line(1),
    train_line(1, 100, 1.0),  # the first of a task does not count
    train_line(1, 300, 100.0),  # 200 images of two ranks in 2 s
    task_line(2),
    train_line(2, 100, 1.0),
    train_line(2, 200, 20.0, waited=3.0),  # 100 images of two ranks in 2 s without the wait
    line("replay_real_only", task=2, step=9),
    train_line(2, 300, 1000.0),  # steps without replay do not count
    train_line(2, 500, 100.0),  # 200 images in 2 s
]


def shard(number: int, worker: int, seconds: float, evaluations: int = 100) -> ShardLine:
    name, sampler = f"replay-{number:06d}.tar", {"task": 2}
    return ShardLine(new_id(), number, name, 4, 40, 999, 1, "a", "b", sampler, 4, evaluations, seconds, worker)


def make_run(root: Path, *overrides: str, log: list[dict[str, Any]] = LOG, device: str = "cpu") -> RunDir:
    """Two workers with two and three shards of the second task, of which the first of each does not count."""
    run = RunDir(root)
    manifest = Manifest(run.replay(2))
    manifest.path.parent.mkdir(parents=True)
    run.config.write_text(yaml.safe_dump(as_plain(digits(*overrides))))
    run.metrics_log.write_text("".join(json.dumps(entry) + "\n" for entry in log))
    for entry in (shard(0, 0, 50.0), shard(1, 1, 50.0), shard(2, 0, 0.5), shard(3, 1, 0.25), shard(5, 1, 0.25)):
        manifest.publish(entry)
    manifest.refresh()
    manifest.retire(2, manifest.shards[2].id)  # gone, and still the record of what it cost
    run.sampler(0).parent.mkdir()
    for worker in (0, 1):
        beat = {"device": device, "device_name": "CPU, 1 thread"}
        run.sampler(worker).write_text(json.dumps(beat))
    return run


def test_rates_of_a_run_by_hand(tmp_path: Path) -> None:
    found = rates_of_run(make_run(tmp_path / "old"), digits(), "cpu", "cpu")
    assert found.images_per_second == pytest.approx((50 + 100) / (2 + 2))
    assert found.images_per_second_without_replay == pytest.approx(100 / 2)
    assert found.evaluations_per_second == pytest.approx(300 / 1.0)
    for words in (str(tmp_path / "old"), "300 images", "2 x CPU, 1 thread", "shards: 3", "300 evaluations"):
        assert words in found.source


def test_the_ranks_of_the_last_attempt_count(tmp_path: Path) -> None:
    log = [*LOG, task_line(2, ranks=1), train_line(2, 600, 9.0), train_line(2, 700, 50.0)]
    found = rates_of_run(make_run(tmp_path / "old", log=log), digits(), "cpu", "cpu")
    assert found.images_per_second == pytest.approx(50) and "100 images" in found.source


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("model.channels=[8,8]", "model.channels=[8,16]", r"model\.channels is \[8, 8\], the plan's is \[8, 16\]"),
        ("data.image_size=8", "data.image_size=16", r"data\.image_size"),
        ("train.precision=fp32", "train.precision=bf16", r"train\.precision is fp32, the plan's is bf16"),
        ("replay.precision=bf16", "replay.precision=fp32", r"replay\.precision"),
        ("train.compile=false", "train.compile=true", r"train\.compile"),
        ("replay.sampler_batch=64", "replay.sampler_batch=32", r"replay\.sampler_batch"),
        ("replay.batch=64", "replay.batch=128", r"replay\.batch"),
        ("train.threads=1", "train.threads=2", r"train\.threads"),
        ("replay.placement=inline", "replay.placement=subprocess", r"replay\.placement=inline"),
    ],
)
def test_a_run_of_something_else_is_refused(tmp_path: Path, old: str, new: str, named: str) -> None:
    run = make_run(tmp_path / "old", old)
    with pytest.raises(UserError, match=named) as caught:
        rates_of_run(run, digits(new), "cpu", "cpu")
    assert "\n" not in str(caught.value) and str(run.config) in str(caught.value)


def test_what_does_not_decide_the_rates_may_differ(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old", "train.global_batch=32", "run.seed=3", "replay.shard_trajectories=512")
    assert rates_of_run(run, digits("train.global_batch=128", "replay.reuse=2"), "cpu", "cpu").images_per_second > 0


def without(path: Callable[[RunDir], Path]) -> Callable[[RunDir], None]:
    return lambda run: path(run).unlink()


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (without(lambda run: run.config), "config.yaml"),
        (without(lambda run: run.metrics_log), "metrics.jsonl"),
        (without(lambda run: run.replay(2) / "manifest.jsonl"), r"two replay shards"),
        (without(lambda run: run.sampler(1)), None),  # the other one still tells
        (lambda run: run.metrics_log.write_text('{"event": "train", "task": 2, "seen": 1e999}\n{}\n'), "log_every"),
    ],
)
def test_a_run_without_what_is_needed_is_refused(
    tmp_path: Path, spoil: Callable[[RunDir], None], named: str | None
) -> None:
    run = make_run(tmp_path / "old")
    spoil(run)
    if named is None:
        assert rates_of_run(run, digits(), "cpu", "cpu").evaluations_per_second == pytest.approx(100 / 0.5)
        return
    with pytest.raises(UserError, match=named) as caught:
        rates_of_run(run, digits(), "cpu", "cpu")
    assert "\n" not in str(caught.value) and str(run.root) in str(caught.value)


def test_another_kind_of_device_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "old")
    with pytest.raises(UserError, match=r"trained on CPU, 1 thread, the plan's trainers are on cuda"):
        rates_of_run(run, digits(), "cuda", "cuda")
    on_gpu = make_run(tmp_path / "gpu", device="cuda:0")
    with pytest.raises(UserError, match=r"sampled on cuda, the plan's teachers are on cpu"):
        rates_of_run(on_gpu, digits(), "cpu", "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_nothing_is_measured_on_a_device_that_is_not_here() -> None:
    with pytest.raises(UserError, match="--measure: this machine has no CUDA device"):
        measure_rates(digits(), 1, "cuda", "cuda")


# --- in a plan --------------------------------------------------------------------------------------------------


def test_a_plan_with_the_rates_of_a_run(tmp_path: Path) -> None:
    """37.5 images/s take 75 evaluations/s on each of 4 trainers: one of the two teachers with 300 is enough."""
    run, config = make_run(tmp_path / "old"), digits("replay.workers=2")
    content = as_json(with_supply(make_plan(config, 4, 0), config, run.root))
    assert content["rates"] == {
        "images_per_second": pytest.approx(37.5),
        "images_per_second_without_replay": pytest.approx(50),
        "evaluations_per_second": pytest.approx(300),
    }
    assert content["teacher_devices_per_trainer_device"] == pytest.approx(0.25)
    assert (content["teacher_devices_needed"], content["trainers"], content["teachers"]) == (1, 4, 2)
    assert content["replay_share"] == pytest.approx(2) and str(run.root) in content["source"]


@pytest.mark.parametrize(
    ("overrides", "evaluations", "words"),
    [
        ((), 100.0, ["1, busy 80 % of the time", "1.25 times what is taken: nobody waits"]),
        ((), 50.0, ["2, busy 80 % of the time", "62.5 % of what is taken: the trainers would wait 37.5 % of the time"]),
        (("replay.on_starved=fail",), 50.0, ["62.5 % of what is taken: the run would end (replay.on_starved=fail)"]),
        (("replay.on_starved=reuse",), 50.0, ["the rest would come late (replay.on_starved=reuse)"]),
        (("replay.placement=inline",), 440.0, ["a step with inline replay", "2 times as long"]),
    ],
)
def test_the_printed_plan_says_what_the_teachers_are_enough_for(
    overrides: tuple[str, ...], evaluations: float, words: list[str]
) -> None:
    """40 images/s take 40 points/s, of 2 evaluations, or 11 in the loop."""
    config = digits(*overrides)
    plan = make_plan(config, 1, 0)
    assert "--measure, or --rates" in printed(plan)
    text = printed(replace(plan, supply=make_supply(config, rates(40, evaluations), 1, 1)))
    assert all(word in text for word in [*words, "by hand", "40 real images a second"]) and "--measure" not in text


def printed(plan: Plan) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(rich_plan(plan))
    return console.export_text()


def test_without_replay_there_is_nothing_to_measure() -> None:
    for override in ("method.name=finetune", "data.tasks=[[0,1]]"):
        config = digits(override)
        plan = make_plan(config, 1, 0)
        assert "--measure" not in printed(plan)
        with pytest.raises(UserError, match=override.partition("=")[0]):
            with_supply(plan, config, None)


@pytest.mark.parametrize(
    ("overrides", "gpus", "teachers"),
    [
        (("replay.workers=3", "replay.device=cuda:1"), 2, 1),
        (("replay.workers=3",), 3, 2),
        (("replay.placement=ranks", "replay.devices_per_node=2"), 3, 2),
    ],
)
def test_samplers_of_one_gpu_are_one_device(
    tmp_path: Path, overrides: tuple[str, ...], gpus: int, teachers: int
) -> None:
    log = [{**entry, "device": "cuda"} if entry["event"] == "task" else entry for entry in LOG]
    run, config = make_run(tmp_path / "old", log=log, device="cuda:0"), digits(*overrides)
    launched = gpus if config.teacher_ranks else 1
    supply = with_supply(make_plan(config, launched, gpus), config, run.root).supply
    assert supply is not None and supply.teachers == teachers
