"""How far a run has come, read from its directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from trainer.cli import USER_ERROR
from trainer.run import RunDir
from trainer.settings import as_plain, load_config, refused_changes
from trainer.standing import Standing, finished_result, standing

ROOT = Path(__file__).resolve().parent.parent
TINY = ["model.channels=[8,8]", "model.norm_groups=4", "data.tasks=[[0,1],[2,3]]"]


def test_it_changes_with_whatever_a_start_leaves(tmp_path: Path) -> None:
    config, run = load_config("digits", TINY), RunDir(tmp_path)
    assert standing(config, run) == Standing(False, 0, 0, 0)
    seen = {str(standing(config, run))}
    for path in (
        run.checkpoints(1) / "step-00000008",
        run.checkpoints(1) / "step-00000012",
        run.teacher(1) / "card.json",
        run.evaluation(1),
        run.local_teacher(2) / "card.json",
        run.fisher(1) / "card.json",
        run.classifier(1) / "card.json",
        run.checkpoints(2) / "step-00000004",
    ):
        path.mkdir(parents=True)
        now = str(standing(config, run))
        assert now not in seen
        seen.add(now)
    assert standing(config, run) == Standing(False, 2, 4, 5)


def test_neither_halves_nor_another_task_count(tmp_path: Path) -> None:
    config, run = load_config("digits", TINY), RunDir(tmp_path)
    for name in (".step-00000008.77.tmp", "damaged-step-00000008", "step-x"):
        (run.checkpoints(1) / name).mkdir(parents=True)
    (run.teacher(1) / "model.safetensors").mkdir(parents=True)
    (run.checkpoints(3) / "step-00000008").mkdir(parents=True)
    assert standing(config, run) == Standing(False, 0, 0, 0)


def test_finished_only_with_every_task(tmp_path: Path) -> None:
    config, run = load_config("digits", TINY), RunDir(tmp_path)
    assert finished_result(run, config) is None
    for content, finished in (({"tasks": 2, "final": {}}, True), ({"tasks": 1, "final": {}}, False), ([], False)):
        run.metrics.write_text(json.dumps(content))
        assert (finished_result(run, config) is not None) is finished
    run.metrics.write_text('{"tasks": 2, "fin')
    assert finished_result(run, config) is None


def test_finished_only_with_the_classifier_asked_for(tmp_path: Path) -> None:
    """One asked for later, or by other settings, is learnt by a run that was finished without it."""
    run, plain, asked = (
        RunDir(tmp_path),
        load_config("digits", TINY),
        load_config("digits", [*TINY, "classifier.epochs=2"]),
    )
    without, with_one = {"tasks": 2, "final": {}}, {"tasks": 2, "final": {"classifier": as_plain(asked)["classifier"]}}
    for content, config, finished in (
        (without, plain, True),
        (without, asked, False),
        (with_one, asked, True),
        (with_one, plain, False),
        (with_one, load_config("digits", [*TINY, "classifier.epochs=3"]), False),
        ({"tasks": 2, "final": 3}, plain, False),
    ):
        run.metrics.write_text(json.dumps(content))
        assert (finished_result(run, config) is not None) is finished
    assert refused_changes(as_plain(plain), as_plain(asked)) == []


def look(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-X", "importtime", str(ROOT / "launch" / "standing.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, timeout=60)


def test_the_command_prints_three_fields_and_loads_no_torch(tmp_path: Path) -> None:
    arguments = ("--config", "digits.yaml", *TINY, f"run.dir={tmp_path}", "run.name=first")
    done = look(*arguments)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/first\tunfinished\ttask 0, step 0, 0 results\n")
    assert "torch" not in done.stderr
    RunDir(tmp_path / "first").root.mkdir()
    RunDir(tmp_path / "first").metrics.write_text('{"tasks": 2, "final": {}}')
    assert look(*arguments).stdout.split("\t")[1] == "finished"


def test_the_command_refuses_what_training_would() -> None:
    done = look("--config", "digits.yaml", "train.nonsense=1")
    assert done.returncode == USER_ERROR and "train.nonsense" in done.stderr and done.stdout == ""
