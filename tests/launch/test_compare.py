"""Comparisons with a launcher that writes results instead of training."""

from __future__ import annotations

import io
import json
import os
import runpy
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from tests.report.checks import read_page
from trainer import compare
from trainer.compare import Comparison, Row, Run, parse_comparison, parse_variant, plan_runs, read_result, run_all
from trainer.compare_report import cells, remarks, summarise, write_report
from trainer.errors import ConfigError, UserError
from trainer.report.spread import statistics_of
from trainer.run import RunDir

TASKS = 5  # of digits.yaml

# Fails for generative_replay with seed 1; says 1 for success and 0 for failure, as launchers may.
FAKE = """
import json, os, pathlib, sys
arguments = sys.argv[1:]
settings = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
root = pathlib.Path(settings["run.dir"]) / settings["run.name"]
root.mkdir(parents=True, exist_ok=True)
with open(root.parent / "calls.jsonl", "a") as file:
    file.write(json.dumps(arguments) + chr(10))
if settings["method.name"] == "generative_replay" and settings["run.seed"] == "1":
    print("error: no disk")
    print("[launcher] exits with return code 2")
    sys.exit(0)
seed, bad = int(settings["run.seed"]), settings["method.name"] == "finetune"
fd = (100.0 if bad else 10.0) + seed
rows = [{"fd": fd * (task + 1) / 5, "kld": 1.0, "accuracy": 0.5} for task in range(5)]
result = {
    "method": settings["method.name"], "tasks": 5, "matrix": {}, "after_task": rows,
    "final": {"fd": fd, "kld": 0.1 * seed, "accuracy": 0.5, "forgetting": None if bad else 1.0},
    "cost": {"train_seconds": 60, "teacher_evaluations": 0 if bad else 2000, "replay_points_used": 0 if bad else 1000},
}
(root / "metrics.json").write_text(json.dumps(result))
sys.exit(1)
"""


@pytest.fixture
def launcher(tmp_path: Path) -> list[str]:
    path = tmp_path / "launcher.py"
    path.write_text(FAKE)
    return [sys.executable, str(path)]


def a_comparison(out: Path, **changes: Any) -> Comparison:
    rows = tuple(Row(name, (f"method.name={name}",)) for name in ("finetune", "generative_replay"))
    return replace(Comparison("digits.yaml", rows, (0, 1), out, command="python launch/compare.py"), **changes)


def run_quietly(comparison: Comparison, launcher: list[str]) -> tuple[list[Run], str]:
    console = Console(file=io.StringIO(), record=True, width=300)
    runs = run_all(comparison, console, launcher)
    return runs, console.export_text()


def calls(out: Path) -> list[list[str]]:
    return [json.loads(line) for line in (out / "calls.jsonl").read_text().splitlines()]


def test_every_method_and_seed_is_a_command_of_its_own(tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    runs, _ = run_quietly(a_comparison(out, overrides=("train.global_batch=32",), num_gpus=2), launcher)
    made = calls(out)
    assert [run.name for run in runs] == [
        "finetune seed 0", "generative_replay seed 0", "finetune seed 1", "generative_replay seed 1",
    ]  # fmt: skip
    first = made[0]
    assert first[:2] == ["--num_gpus", "2"] and first[2] == "--master_port"
    assert first[4].endswith("launch/train.py") and Path(first[4]).is_absolute()
    assert first[5:] == [
        "--config", "digits.yaml", "train.global_batch=32", "method.name=finetune",
        f"run.dir={out}", "run.name=finetune-seed0", "run.seed=0",
    ]  # fmt: skip
    assert len({call[3] for call in made}) > 1 and all(1024 < int(call[3]) < 65536 for call in made)


def test_a_failed_run_is_named_with_its_log_and_the_others_go_on(tmp_path: Path, launcher: list[str]) -> None:
    runs, said = run_quietly(a_comparison(tmp_path / "out"), launcher)
    failed = [run for run in runs if run.result is None]
    assert [run.name for run in failed] == ["generative_replay seed 1"]
    assert failed[0].error == "exit code 0: error: no disk"
    assert str(failed[0].log) in said
    log = failed[0].log.read_text()
    assert log.startswith("$ ") and "run.seed=1" in log and "return code 2" in log
    assert sum(run.result is not None for run in runs) == 3, "exit code 1 with a complete metrics.json is a success"


def test_the_same_command_again_starts_only_what_is_not_finished(tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    run_quietly(a_comparison(out), launcher)
    metrics = RunDir(out / "finetune-seed0").metrics
    metrics.write_text(metrics.read_text()[:-40])
    before = len(calls(out))
    runs, said = run_quietly(a_comparison(out), launcher)
    again = [next(a for a in call if a.startswith("run.name=")) for call in calls(out)[before:]]
    assert again == ["run.name=finetune-seed0", "run.name=generative_replay-seed1"]
    assert "4 runs" in said and "2 of them finished" in said
    assert sum(run.result is not None for run in runs) == 3


def test_runs_side_by_side_have_ports_of_their_own(tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    runs, _ = run_quietly(a_comparison(out, jobs=4), launcher)
    assert len({call[3] for call in calls(out)}) == 4
    assert sum(run.result is not None for run in runs) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"tasks": TASKS - 1},
        {"after_task": [{"fd": 1.0}] * (TASKS - 1)},
        {"final": {"fd": 1.0}},
        {"final": None},
        {"cost": None},
    ],
)
def test_incomplete_results_are_none(tmp_path: Path, change: dict[str, Any]) -> None:
    final = {"fd": 1.0, "kld": 1.0, "accuracy": 1.0, "forgetting": 0.0}
    complete = {"tasks": TASKS, "after_task": [{"fd": 1.0}] * TASKS, "final": final, "cost": {}}
    path = RunDir(tmp_path).metrics
    assert read_result(RunDir(tmp_path), TASKS) is None
    path.write_text(json.dumps(complete))
    assert read_result(RunDir(tmp_path), TASKS) == complete
    path.write_text(json.dumps(complete | change))
    assert read_result(RunDir(tmp_path), TASKS) is None


def test_a_run_with_other_settings_is_refused_before_anything_starts(tmp_path: Path, launcher: list[str]) -> None:
    from omegaconf import OmegaConf

    from trainer.settings import as_plain, load_config

    out = tmp_path / "out"
    comparison = a_comparison(out, rows=(Row("finetune", ("method.name=finetune",)),), seeds=(0,))
    run = plan_runs(comparison)[0]
    held = load_config("digits.yaml", [*run.overrides, "tracking.progress=false"])
    run.directory.root.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(as_plain(held)), run.directory.config)
    run_quietly(comparison, launcher)
    assert len(calls(out)) == 1
    for override in ("optimizer.lr=0.1", "zero.stage=2"):
        with pytest.raises(UserError, match=f"config.yaml: .*{override.partition('=')[0]}"):
            run_quietly(replace(comparison, overrides=(override,)), launcher)
    run.directory.metrics.unlink()
    run_quietly(replace(comparison, overrides=("zero.stage=2",)), launcher)  # an unfinished run may change its stage
    assert len(calls(out)) == 2


def test_a_key_younger_than_a_finished_run_counts_as_its_default(tmp_path: Path, launcher: list[str]) -> None:
    from omegaconf import OmegaConf

    from trainer.settings import as_plain, load_config

    out = tmp_path / "out"
    comparison = a_comparison(out, rows=(Row("finetune", ("method.name=finetune",)),), seeds=(0,))
    runs, _ = run_quietly(comparison, launcher)
    held = as_plain(load_config("digits.yaml", runs[0].overrides))
    del held["replay"]["solver"], held["evaluation"]
    OmegaConf.save(OmegaConf.create(held), runs[0].directory.config)
    settings = ("evaluation.samples=2000", "evaluation.steps=10")  # the defaults, where the file has others
    run_quietly(replace(comparison, overrides=settings), launcher)
    assert len(calls(out)) == 1
    for override in ("replay.solver=dpmpp", "evaluation.solver=dpmpp"):
        message = f"config.yaml: .*{override.partition('=')[0]} .ddim -> dpmpp"
        with pytest.raises(UserError, match=message):
            run_quietly(replace(comparison, overrides=(*settings, override)), launcher)


def test_a_finished_run_goes_on_for_a_classifier_that_is_asked_for(tmp_path: Path, launcher: list[str]) -> None:
    """The stand-in learns none, so that it stays to be learnt; nothing else of a finished run may change with it."""
    from omegaconf import OmegaConf

    from trainer.settings import as_plain, load_config

    out = tmp_path / "out"
    comparison = a_comparison(out, rows=(Row("finetune", ("method.name=finetune",)),), seeds=(0,))
    run = run_quietly(comparison, launcher)[0][0]
    OmegaConf.save(OmegaConf.create(as_plain(load_config("digits.yaml", run.overrides))), run.directory.config)
    wanted = replace(comparison, overrides=("classifier.epochs=2",))
    (found,) = plan_runs(wanted)
    assert found.result is None and plan_runs(comparison)[0].result is not None
    with pytest.raises(UserError, match=r"config.yaml: .*zero.stage"):
        plan_runs(replace(wanted, overrides=(*wanted.overrides, "zero.stage=2")))
    (failed,), said = run_quietly(wanted, launcher)
    assert failed.result is None and failed.error and "failed" in said, "its result of before is not that asked for"
    result = json.loads(run.directory.metrics.read_text())
    result["final"]["classifier"] = as_plain(load_config("digits.yaml", ["classifier.epochs=2"]))["classifier"]
    run.directory.metrics.write_text(json.dumps(result))
    assert plan_runs(wanted)[0].result == result


def threads_of(comparison: Comparison) -> set[tuple[str, ...]]:
    """What is said of threads in the commands of a comparison's runs."""
    runs = plan_runs(comparison)
    return {tuple(setting for setting in run.overrides if setting.startswith("train.threads")) for run in runs}


@pytest.mark.parametrize(
    ("cores", "jobs", "num_gpus", "threads"), [(16, 4, 1, 4), (16, 2, 2, 4), (7, 2, 1, 3), (2, 4, 1, 1)]
)
def test_runs_side_by_side_share_the_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cores: int, jobs: int, num_gpus: int, threads: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)))
    comparison = a_comparison(tmp_path / "out", jobs=jobs, num_gpus=num_gpus)
    assert threads_of(comparison) == {(f"train.threads={threads}",)}
    assert threads_of(replace(comparison, jobs=1)) == {()}


def test_threads_that_somebody_chose_stay(tmp_path: Path) -> None:
    comparison = a_comparison(tmp_path / "out", jobs=4)
    for chosen in ("train.threads=3", "train.threads=0"):
        assert threads_of(replace(comparison, overrides=(chosen,))) == {(chosen,)}
    path = tmp_path / "mine.yaml"
    text = (Path(compare.__file__).parent.parent / "configs" / "digits.yaml").read_text()
    path.write_text(f"{text}\ntrain: {{threads: 3}}\n")
    assert threads_of(replace(comparison, config=str(path))) == {()}


def test_bad_settings_are_refused_before_anything_starts(tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    variant = Row("odd", ("method.name=joint", "train.images_per_task=-1"))
    with pytest.raises(ConfigError, match=r"train\.images_per_task"):
        run_quietly(a_comparison(out, rows=(*a_comparison(out).rows, variant)), launcher)
    assert not out.exists()


# --- ends -------------------------------------------------------------------------------------------------------

STUBBORN = """
import os, pathlib, signal, subprocess, sys, time
settings = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
out = pathlib.Path(settings["run.dir"])
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
(out / "pids.tmp").write_text(f"{os.getpid()} {child.pid}")
os.rename(out / "pids.tmp", out / "pids")
time.sleep(600)
"""

DRIVER = """
import pathlib, sys
from rich.console import Console
from tests.report.checks import read_page
from trainer import compare
compare.GRACE = 0.5
row = compare.Row("joint", ("method.name=joint",))
comparison = compare.Comparison("digits.yaml", (row,), (0,), pathlib.Path(sys.argv[1]))
compare.run_all(comparison, Console(), [sys.executable, sys.argv[2]])
"""


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_comparison_leaves_no_process(tmp_path: Path, number: signal.Signals) -> None:
    script, out = tmp_path / "stubborn.py", tmp_path / "out"
    script.write_text(STUBBORN)
    root = str(Path(compare.__file__).resolve().parent.parent)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(out), str(script)],
        env=os.environ | {"PYTHONPATH": root},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not (out / "pids").exists():
        assert driver.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    pids = [int(pid) for pid in (out / "pids").read_text().split()]
    assert all(map(is_running, pids))
    driver.send_signal(number)
    _, errors = driver.communicate(timeout=30)
    assert b"KeyboardInterrupt" in errors
    assert not any(map(is_running, pids))


def test_what_outlives_its_launcher_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "GRACE", 0.3)
    script, out = tmp_path / "deserter.py", tmp_path / "out"
    script.write_text(STUBBORN.replace("time.sleep(600)\n", "sys.exit(1)\n"))
    comparison = a_comparison(out, rows=(Row("joint", ("method.name=joint",)),), seeds=(0,))
    runs, _ = run_quietly(comparison, [sys.executable, str(script)])
    assert runs[0].error.startswith("exit code 1")
    assert not any(is_running(int(pid)) for pid in (out / "pids").read_text().split())


# --- the command line -------------------------------------------------------------------------------------------


def test_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["train.global_batch=8", "--config", "digits.yaml", "--methods", "finetune,joint", "--seeds", "3,1"]
    argv += [
        "--variant",
        "wide:method.name=joint,model.channels=[32,64],ema.decay=0.9",
        "--jobs",
        "2",
        "--mean",
        "data.flip=true",
    ]
    comparison = parse_comparison(argv)
    assert comparison.rows == (
        Row("finetune", ("method.name=finetune",)),
        Row("joint", ("method.name=joint",)),
        Row("wide", ("method.name=joint", "model.channels=[32,64]", "ema.decay=0.9")),
    )
    assert comparison.seeds == (3, 1) and comparison.jobs == 2 and comparison.mean and comparison.num_gpus == 1
    assert comparison.overrides == ("train.global_batch=8", "data.flip=true")
    assert comparison.out == Path("runs/compare-digits")
    assert comparison.command.startswith("python launch/compare.py train.global_batch=8 --config digits.yaml")


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ([], "--methods"),
        (["--methods", "finetun"], "finetun"),
        (["--methods", "joint,joint"], "twice"),
        (["--methods", "joint", "--variant", "joint:zero.stage=2"], "twice"),
        (["--methods", "joint", "--seeds", "0,0"], "--seeds"),
        (["--methods", "joint", "--seeds", "a"], "--seeds"),
        (["--methods", "joint", "run.seed=1"], "run.seed"),
        (["--methods", "joint", "method.name=finetune"], "method.name"),
        (["--variant", "a:run.name=x"], "run.name"),
        (["--variant", "a"], "--variant"),
        (["--variant", "../a:b.c=1"], "--variant"),
        (["--variant", "a:b"], "--variant"),
        (["--methods", "joint", "--jobs", "0"], "--jobs"),
        (["--methods", "joint", "--nonsense"], "--nonsense"),
    ],
)
def test_bad_command_lines_are_user_errors(extra: list[str], named: str) -> None:
    with pytest.raises(UserError, match=named):
        parse_comparison(["--config", "digits.yaml", *extra])


def test_commas_in_brackets_do_not_split_a_variant() -> None:
    assert parse_variant("a:x.y=[1,[2,3]],z.w={a: 1, b: 2},k.l=3").overrides == (
        "x.y=[1,[2,3]]", "z.w={a: 1, b: 2}", "k.l=3",
    )  # fmt: skip


# --- the report -------------------------------------------------------------------------------------------------


def test_statistics_agree_with_numpy() -> None:
    values = np.random.default_rng(0).normal(size=7)
    found = statistics_of(values.tolist())
    assert found.median == pytest.approx(np.median(values)) and found.mean == pytest.approx(values.mean())
    assert found.sd == pytest.approx(values.std(ddof=1))
    assert (found.low, found.high, found.count) == (values.min(), values.max(), 7)
    assert statistics_of([2.0]).sd is None


def test_the_table_and_the_files(tmp_path: Path, launcher: list[str]) -> None:
    comparison = a_comparison(tmp_path / "out", seeds=(0, 1, 2))
    runs, _ = run_quietly(comparison, launcher)
    header, finetune, replay = cells(comparison, runs)
    assert header[:6] == ["", "seeds", "FD", "KLD", "accuracy", "forgetting"]
    assert finetune == [
        "finetune",
        "3",
        "101 (100..102)",
        "0.100 (0..0.200)",
        "0.500 (0.500..0.500)",
        "-",
        "60.0 (60.0..60.0)",
        "0 (0..0)",
    ]
    assert replay[:3] == ["generative_replay", "2 of 3", "11.0 (10.0..12.0)"]
    assert replay[-1] == "2.000 (2.000..2.000)"
    assert cells(replace(comparison, mean=True), runs)[1][2] == "101 ± 1.000"
    assert summarise(comparison, runs)["generative_replay"]["forgetting"].count == 2

    paths = write_report(comparison, runs)
    assert [path.name for path in paths] == ["compare.json", "compare.md", "compare.png", "index.html"]
    content = json.loads(paths[0].read_text())
    assert content["rows"][0]["summary"]["fd"]["median"] == 101.0
    assert content["rows"][1]["runs"][1]["error"] and content["versions"]["torch"]
    text = paths[1].read_text()
    assert text.startswith("    python launch/compare.py\n") and "| finetune | 3 | 101 (100..102) |" in text
    assert "- generative_replay seed 1 failed: exit code 0: error: no disk" in text
    with Image.open(paths[2]) as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1 << 24) or []) > 10


def test_results_of_different_evaluators_are_remarked_on(tmp_path: Path, launcher: list[str]) -> None:
    runs, _ = run_quietly(a_comparison(tmp_path / "out", seeds=(0,)), launcher)
    assert remarks(runs) == []
    assert runs[0].result is not None
    runs[0].result["evaluator"] = "another"
    assert ["not comparable" in remark for remark in remarks(runs)] == [True]


def test_the_entry_point_exits_1_after_a_failed_run(
    tmp_path: Path, launcher: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(compare.TRAIN.parent / "compare.py"))["main"]
    monkeypatch.setattr(run_all, "__defaults__", (launcher,))
    argv = ["--config", "digits.yaml", "--methods", "finetune,generative_replay", "--out", str(tmp_path / "out")]
    assert main(argv) == 0
    assert main([*argv, "--seeds", "0,1"]) == 1
    printed = capsys.readouterr().out
    assert "generative_replay seed 1 failed: exit code 0: error: no disk" in printed
    assert str(tmp_path / "out" / "compare.png") in printed.replace("\n", "")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert f"python launch/compare.py {shlex.join(argv)} --seeds 0,1" in text


def test_without_any_result_there_is_a_report_and_no_picture(tmp_path: Path, launcher: list[str]) -> None:
    comparison = a_comparison(tmp_path / "out", rows=(Row("r", ("method.name=generative_replay",)),), seeds=(1,))
    runs, _ = run_quietly(comparison, launcher)
    paths = write_report(comparison, runs)
    assert [path.name for path in paths] == ["compare.json", "compare.md", "index.html"]
    assert "r seed 1 failed: exit code 0: error: no disk" in read_page(paths[-1]).content
    assert cells(comparison, runs)[1] == ["r", "0 of 1", *["-"] * 6]
