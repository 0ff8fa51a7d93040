"""The main job from a data set to a result table, killed, resumed, continued and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.report.checks import read_page, sections

from .conftest import COLD, TASKS, Workplace, finish, wait_until_published

Launcher = Callable[[int], tuple[str, ...]]


def run_with_teacher(workplace: Workplace, name: str, *arguments: str, ranks: int = 1) -> None:
    """A run that succeeds, with a sampler that is started beside it, not by it, and ends with it."""
    sampler = workplace.fork("teacher.py", "--run", f"runs/{name}")
    trainers = workplace.ranks(ranks, f"run.name={name}", "replay.placement=external", *arguments)
    assert trainers.wait(150) == 0, trainers.printed()
    assert sampler.wait() == 0, sampler.printed()


@pytest.fixture(scope="session")
def whole(workplace: Workplace) -> str:
    """A finished run of two tasks with the sidecar, started as a person would, the reference of the forked ones; what
    it printed."""
    code, output = workplace.run("run.name=whole", TASKS, launcher=COLD)
    assert code == 0, output
    return output


def test_result_is_complete(workplace: Workplace, whole: str) -> None:
    result = workplace.metrics("whole")
    assert (result["method"], result["tasks"]) == ("generative_distillation", 2)
    for metric in ("fd", "accuracy"):
        rows = result["matrix"][metric]
        assert [len(row) for row in rows] == [2, 2]
        assert rows[0][1] is None
        assert all(value is not None for value in (rows[0][0], *rows[1]))
    assert {"fd", "kld", "accuracy", "forgetting"} <= result["final"].keys()
    assert len(result["after_task"]) == 2
    cost = result["cost"]
    assert cost["replay_points_used"] == 192
    # Three shards of 16 trajectories, 3 DDIM steps and 4 targets each.
    assert cost["teacher_evaluations"] == 3 * 16 * (3 + 4)
    assert {"train_seconds", "starved_seconds", "images_per_second"} <= cost.keys()


def test_pictures_and_files(workplace: Workplace, whole: str) -> None:
    run = workplace.path / "runs" / "whole"
    for path in ("tasks/1/samples.png", "tasks/2/samples.png", "report/history.png", "report/matrix-fd.png"):
        assert (run / path).read_bytes().startswith(b"\x89PNG")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"train", "evaluation", "task"} <= {line["event"] for line in lines}
    assert str(Path("runs/whole/tasks/2/samples.png")) in whole and "runs/whole/report/index.html" in whole
    found = sections(read_page(run / "report/index.html"))
    assert {"end", "samples", "matrices", "forgetting", "timesteps", "training", "cost"} <= found.keys()
    assert "2 tasks" in (run / "report/index.html").read_text()
    assert "FD" in whole


def test_finished_run_prints_its_result_again(workplace: Workplace, whole: str) -> None:
    before = workplace.metrics("whole")
    code, output = workplace.run("run.name=whole", TASKS)
    assert code == 0, output
    assert output.splitlines()[-8:] == whole.splitlines()[-8:]
    assert workplace.metrics("whole") == before


def test_a_finished_run_learns_a_classifier_that_is_asked_for_later(workplace: Workplace, whole: str) -> None:
    run = workplace.path / "runs" / "later"
    shutil.copytree(workplace.path / "runs" / "whole", run)
    before = [(run / f"tasks/{task}/evaluation.json").stat().st_mtime_ns for task in (1, 2)]
    code, output = workplace.run("run.name=later", TASKS, "classifier.epochs=1")
    assert code == 0, output
    result, known = workplace.metrics("later"), workplace.metrics("whole")
    assert result["matrix"] == known["matrix"] | {"classifier_accuracy": result["matrix"]["classifier_accuracy"]}
    assert 0 < result["final"]["classifier_accuracy"] <= 1 and result["final"]["fd"] == known["final"]["fd"]
    assert [(run / f"tasks/{task}/evaluation.json").stat().st_mtime_ns for task in (1, 2)] == before
    assert workplace.teacher_id("later", 2) == workplace.teacher_id("whole", 2)


def test_a_report_that_was_not_drawn_any_more_is_drawn_by_the_same_command(workplace: Workplace, whole: str) -> None:
    """As after a kill between the result and the page."""
    run = workplace.path / "runs" / "undrawn"
    shutil.copytree(workplace.path / "runs" / "whole", run)
    shutil.rmtree(run / "report")
    code, output = workplace.run("run.name=undrawn", TASKS)
    assert code == 0, output
    pictures = {path.name for path in (workplace.path / "runs/whole/report").iterdir()}
    assert {path.name for path in (run / "report").iterdir()} == pictures
    assert (run / "report/history.png").read_bytes() == (workplace.path / "runs/whole/report/history.png").read_bytes()
    page = run / "report/index.html"
    read_page(page)
    drawn = page.stat().st_mtime_ns
    assert workplace.run("run.name=undrawn", TASKS)[0] == 0 and page.stat().st_mtime_ns == drawn
    code, output = workplace.tool("evaluate.py", "--run", "runs/undrawn", "--report")
    assert code == 0 and output.splitlines()[-1] == "runs/undrawn/report/index.html"
    assert page.stat().st_mtime_ns > drawn
    code, output = workplace.tool("evaluate.py", "--run", "runs/undrawn", "--report", "--task", "1")
    assert code == 2 and "--report" in output


def test_pipeline_loads_in_diffusers(workplace: Workplace, whole: str) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(str(workplace.path / "runs/whole/tasks/2/pipeline"))
    assert pipeline.unet.config.sample_size == 8


def test_task_appended_is_learnt_next(workplace: Workplace, whole: str) -> None:
    shutil.copytree(workplace.path / "runs" / "whole", workplace.path / "runs" / "longer")
    run_with_teacher(workplace, "longer", "data.tasks=[[0,1],[2,3],[7]]")
    assert workplace.metrics("longer")["tasks"] == 3
    assert workplace.teacher_id("longer", 2) == workplace.teacher_id("whole", 2)
    assert {row["evaluator"] for row in workplace.metrics("longer")["after_task"]} == {
        workplace.metrics("longer")["evaluator"]
    }


def test_a_guided_run_counts_what_guidance_costs(workplace: Workplace, whole: str) -> None:
    guided = ("model.label_dropout=0.2", "replay.guidance=2", "evaluation.guidance=1.5")
    code, output = workplace.run("run.name=guided", TASKS, "replay.placement=inline", *guided)
    assert code == 0, output
    result = workplace.metrics("guided")
    assert result["cost"]["teacher_evaluations"] == 192 * (2 * 3 + 1)
    assert result["final"]["sampler"] == {"steps": 3, "solver": "ddim", "eta": 0.0, "guidance": 1.5}
    classes = json.loads((workplace.path / "runs/guided/tasks/2/pipeline/classes.json").read_text())
    assert classes["null_class"] == 10


def test_killed_run_ends_with_the_same_weights(workplace: Workplace, whole: str) -> None:
    """kill -9 of the whole job in each task; the same command then gives the uninterrupted run's weights."""
    run = workplace.path / "runs" / "killed"
    for checkpoint in ("tasks/1/checkpoints/step-00000004", "tasks/2/checkpoints/step-00000006"):
        process = workplace.start("run.name=killed", TASKS)
        wait_until_published(run / checkpoint, process)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        psutil.wait_procs(children, timeout=10)
        assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    code, output = workplace.run("run.name=killed", TASKS)
    assert code == 0, output
    for task in (1, 2):
        assert workplace.teacher_id("killed", task) == workplace.teacher_id("whole", task)
    assert workplace.metrics("killed")["matrix"] == workplace.metrics("whole")["matrix"]
    assert workplace.metrics("killed")["cost"]["replay_points_used"] == 192


def test_sigterm_saves_and_says_how_to_go_on(workplace: Workplace, whole: str) -> None:
    run = workplace.path / "runs" / "stopped"
    process = workplace.start("run.name=stopped", TASKS)
    wait_until_published(run / "tasks/1/checkpoints/step-00000002", process)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 0, output
    assert "the same command goes on from here" in output
    run_with_teacher(workplace, "stopped", TASKS)
    assert workplace.teacher_id("stopped", 2) == workplace.teacher_id("whole", 2)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_learn_what_one_does(workplace: Workplace, whole: str, stage: int) -> None:
    """The same counts and, within rounding, the same measures as one process."""
    name = f"ranks-{stage}"
    run_with_teacher(workplace, name, TASKS, f"zero.stage={stage}", ranks=2)
    result, reference = workplace.metrics(name), workplace.metrics("whole")
    assert result["cost"]["teacher_evaluations"] == reference["cost"]["teacher_evaluations"]
    assert result["final"]["fd"] == pytest.approx(reference["final"]["fd"], rel=1e-2)


def test_teacher_rank_beside_two_trainer_ranks(workplace: Workplace, whole: str, deepspeed: Launcher) -> None:
    code, output = workplace.run("run.name=teacher-rank", TASKS, "replay.placement=ranks", launcher=deepspeed(3))
    assert code == 0, output
    result = workplace.metrics("teacher-rank")
    assert result["cost"]["teacher_evaluations"] == workplace.metrics("whole")["cost"]["teacher_evaluations"]
    assert result["final"]["fd"] == pytest.approx(workplace.metrics("whole")["final"]["fd"], rel=1e-2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=finetune",),
        ("method.name=joint",),
        ("method.name=experience_replay", "method.buffer_per_class=4"),
        ("method.name=experience_replay", "method.buffer=reservoir", "method.buffer_size=9"),
        ("method.name=lwf", "replay.placement=inline", "method.penalty=ewc", "method.fisher_images=8"),
        ("method.name=gaussian_distillation", "replay.placement=external"),
        ("method.name=partial_generation", "replay.placement=inline", "zero.stage=3"),
        ("method.name=generative_replay", "model.conditional=false", "replay.placement=external"),
        ("method.name=generative_distillation", "replay.placement=inline", "train.micro_batch=8"),
        (
            *("method.name=generative_distillation", "replay.points=trajectory", "replay.points_per_trajectory=2"),
            "replay.placement=external",
        ),
    ],
    ids=lambda overrides: "-".join(item.split("=")[1] for item in overrides),
)
def test_every_method_runs(workplace: Workplace, whole: str, overrides: tuple[str, ...]) -> None:
    name = "-".join(item.split("=")[1] for item in overrides)
    if "replay.placement=external" in overrides:
        run_with_teacher(workplace, name, TASKS, *overrides)
    else:
        code, output = workplace.run(f"run.name={name}", TASKS, *overrides)
        assert code == 0, output
    result = workplace.metrics(name)
    rehearsed = "finetune" not in name and "joint" not in name
    assert result["cost"]["replay_points_used"] == (192 if rehearsed else 0)
    assert (result["final"]["accuracy"] is None) == ("false" in name)


def refused(workplace: Workplace, *arguments: str) -> str:
    """The one line of a command that must end with code 2, without a traceback, before the first step."""
    code, output = workplace.run(*arguments, timeout=60)
    assert code == 2, output
    lines = [line for line in output.splitlines() if "WARNING" not in line]
    assert len(lines) == 1, output
    assert lines[0].startswith("error: ")
    return lines[0]


def test_refused_before_the_first_step(workplace: Workplace, whole: str, tmp_path: Path) -> None:
    other = refused(workplace, "run.name=whole", TASKS, "train.global_batch=32")
    assert "train.global_batch (16 -> 32)" in other
    assert "config.yaml" in other
    assert "run.name" in other
    missing = refused(workplace, "run.name=none", "data.source=folder", "data.source_path=nowhere")
    assert "nowhere" in missing
    assert "data.source_path" in missing
    weights = refused(workplace, "run.name=none", TASKS, "evaluation.extractor=dinov2")
    assert "evaluation.extractor=dinov2" in weights


def test_corrupt_shard_is_named(workplace: Workplace, whole: str) -> None:
    root = workplace.path / "damaged"
    shutil.copytree(next((workplace.path / "data").iterdir()), root)
    shard = next((root / "train" / "task-01").glob("*.tar"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    line = refused(workplace, "run.name=none", TASKS, "data.root=damaged")
    assert shard.name in line
    assert "data.root" in line
    assert not (workplace.path / "runs" / "none" / "config.yaml").exists()


def test_teacher_of_another_run_is_refused(workplace: Workplace, whole: str) -> None:
    run = workplace.path / "runs" / "swapped"
    shutil.copytree(workplace.path / "runs" / "whole", run)
    (run / "metrics.json").unlink()
    shutil.rmtree(run / "tasks" / "1" / "teacher")
    shutil.copytree(run / "tasks" / "2" / "teacher", run / "tasks" / "1" / "teacher")
    line = refused(workplace, "run.name=swapped", TASKS)
    assert "teacher of another run" in line
    assert "tasks/1/teacher" in line


def test_second_start_on_a_live_run_is_refused(workplace: Workplace, whole: str) -> None:
    run = workplace.path / "runs" / "live"
    settings = ("run.name=live", TASKS, "train.images_per_task=192000")  # it is not over while the second waits
    process = workplace.start(*settings)
    wait_until_published(run / "lock", process)
    assert "a live run holds this directory" in refused(workplace, *settings)
    ranks = workplace.ranks(2, *settings)  # the second hears of it from the first
    assert [rank.wait() for rank in ranks.jobs] == [2, 2], ranks.printed()
    assert ranks.printed().count("a live run holds this directory") == 1
    process.kill()


def test_no_room_on_the_disk(workplace: Workplace, whole: str) -> None:
    line = refused(workplace, "run.name=none2", TASKS, "checkpoint.keep=2000000000")
    assert "are free" in line
    assert "run.dir" in line


def test_method_with_no_teacher_in_sight_ends(workplace: Workplace, whole: str) -> None:
    """An external sidecar that nobody started: waiting has an end, and it says so."""
    shutil.copytree(workplace.path / "runs" / "whole", workplace.path / "runs" / "alone")
    for path in ("metrics.json", "tasks/2"):
        target = workplace.path / "runs" / "alone" / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    code, output = workplace.run("run.name=alone", TASKS, "replay.placement=external", "replay.timeout=2")
    assert code == 2, output
    assert "Traceback" not in output
    assert "replay.timeout" in output


def test_impossible_batch_ends_on_every_rank(workplace: Workplace) -> None:
    ranks = workplace.ranks(2, "run.name=none3", "train.global_batch=15")
    assert [rank.wait() for rank in ranks.jobs] == [2, 2]
    output = ranks.printed()
    assert output.count("error: train.global_batch=15: does not divide over 2 trainer ranks") == 1
    assert "Traceback" not in output


def test_what_the_main_rank_refuses_ends_every_rank(workplace: Workplace) -> None:
    ranks = workplace.ranks(2, "run.name=none4", "data.source=folder", "data.source_path=nowhere")
    assert [rank.wait() for rank in ranks.jobs] == [2, 2], ranks.printed()
    output = ranks.printed()
    said = [line for line in output.splitlines() if "error" in line]
    assert len(said) == 1, output
    assert said[0].startswith("error: nowhere: missing; put the raw images there (key data.source_path)")
    assert "Traceback" not in output


def test_diverged_loss_ends_the_run(workplace: Workplace, whole: str) -> None:
    settings = ("optimizer.lr=1e30", "optimizer.clip_norm=0", "train.max_skipped=5")
    code, output = workplace.run("run.name=diverged", TASKS, *settings)
    assert code == 2, output
    assert "the loss or gradient of task 1 was no finite number for 5 steps in a row" in output
    assert "optimizer.lr" in output
    assert "Traceback" not in output


def test_finished_task_is_measured_again(workplace: Workplace, whole: str) -> None:
    code, output = workplace.tool("evaluate.py", "--run", "runs/whole", "--task", "1")
    assert code == 0, output
    measured = json.loads(output)
    assert measured["fd"] == workplace.metrics("whole")["after_task"][0]["fd"]
    code, output = workplace.tool("evaluate.py", "--run", "runs/whole", "train.global_batch=3")
    assert code == 2
    assert "train.global_batch=3: only evaluation.*" in output


def test_images_of_a_trained_run(workplace: Workplace, whole: str) -> None:
    code, output = workplace.tool("sample.py", "--run", "runs/whole", "--count", "6", "--steps", "2", "--out", "images")
    assert code == 0, output
    names = sorted(path.name for path in (workplace.path / "images").iterdir())
    assert len([name for name in names if "class" in name]) == 6
    assert "grid.png" in names
