"""Several processes, interruptions and broken images: the same bytes whatever happens, and nothing made twice."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from imagenet_files import (
    LISTED,
    make_tree,
    parquet_rows,
    write_class_folders,
    write_imagenet_tars,
    write_labels,
    write_parquet,
)

from data_tools import build as build_module
from data_tools import crew as crew_module
from data_tools import jobs, spool
from data_tools import verify as verify_module
from data_tools.__main__ import main
from data_tools.build import build
from data_tools.crew import Crew
from data_tools.spec import BuildSpec
from data_tools.verify import verify
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.shards import read_index, task_directory
from trainer.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]
TREE = make_tree(train=12, val=3)


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture
def units_of_5(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small units, so that a small data set gives work to several processes."""
    for module in (spool, build_module, verify_module):
        monkeypatch.setattr(module, "UNIT", 5)


@pytest.fixture
def spec(tmp_path: Path, units_of_5: None) -> BuildSpec:
    """36 training and 9 test images in class folders."""
    (tmp_path / "classes.txt").write_text("\n".join(LISTED) + "\n")
    raw = write_class_folders(tmp_path / "raw", TREE)
    listed = str(tmp_path / "classes.txt")
    return BuildSpec("i", "folder", [[2, 0], [1]], 8, 3, source_path=str(raw), class_list=listed, shard_size=7)


@pytest.mark.parametrize("source", ["folder", "imagenet", "parquet"])
def test_the_number_of_processes_does_not_show(spec: BuildSpec, tmp_path: Path, source: str) -> None:
    raw = tmp_path / source
    if source == "folder":
        write_class_folders(raw, TREE)
    elif source == "imagenet":
        write_labels(write_imagenet_tars(raw, TREE), TREE, "archive")
    else:
        pytest.importorskip("pyarrow", reason="pyarrow is not installed")
        for split, name in (("train", "train"), ("val", "validation")):
            write_parquet(raw / f"{name}.parquet", parquet_rows(TREE, split)[::-1])
    spec = replace(spec, source=source, source_path=str(raw))
    for workers in (1, 3):
        build(spec, tmp_path / f"out-{workers}", False, workers)
        assert not verify(tmp_path / f"out-{workers}", 1).damage
    assert files(tmp_path / "out-1") == files(tmp_path / "out-3")
    assert not list((tmp_path / "out-1").rglob(".spool"))


def test_the_report_does_not_depend_on_it_either(spec: BuildSpec, tmp_path: Path) -> None:
    root = tmp_path / "out"
    build(spec, root, False, 1)
    for split, task, number in (("train", 1, 2), ("test", 2, 0), ("train", 2, 0)):
        path = task_directory(root, split, task) / f"{split}-{task:02d}-{number:05d}.tar"
        path.write_bytes(path.read_bytes()[:-1])
    reports = [verify(root, workers) for workers in (1, 2)]
    assert len(reports[0].damage) == 3 and reports[0] == reports[1]


def test_an_interrupted_build_goes_on_with_what_is_missing(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted once while images are encoded, once while shards are written."""
    encoded: list[str] = []
    original = jobs.decode

    def counting(file: Any, where: str) -> Any:
        if len(encoded) == 17:
            encoded.append("end")
            raise KeyboardInterrupt
        encoded.append(where)
        return original(file, where)

    monkeypatch.setattr(jobs, "decode", counting)
    root = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        build(spec, root, False, 1)
    assert len(list((root / ".spool").glob("unit-*.tar"))) == 3 and not list(root.rglob("train-*.tar"))
    written: list[Path] = []
    write = jobs.write_atomic

    def failing(path: Path, data: bytes) -> None:
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(path)
        write(path, data)

    monkeypatch.setattr(jobs, "write_atomic", failing)
    with pytest.raises(KeyboardInterrupt):
        build(spec, root, False, 1)
    encoded.remove("end")
    again = len(encoded) - len(set(encoded))
    assert len(set(encoded)) == 45 and again == 2  # the two of the unit that was not whole
    stamps = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(jobs, "write_atomic", write)
    build(spec, root, False, 1)
    assert len(encoded) == 45 + again and all(path.stat().st_mtime_ns == stamps[path] for path in written)
    build(spec, tmp_path / "other", False, 1)
    assert files(root) == files(tmp_path / "other")


def test_kept_images_of_other_settings_or_files_are_not_taken(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    monkeypatch.setattr(build_module, "_write_part", lambda *_: 1 / 0)
    for size in (6, 8):
        with pytest.raises(ZeroDivisionError):
            build(replace(spec, image_size=size), root, False, 1)
    first = sorted((tmp_path / "raw" / "train" / LISTED[0]).iterdir())[0]
    first.rename(first.with_name("zz.JPEG"))  # the others move up by one
    damaged = next((root / ".spool").glob("unit-*.tar"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    next((root / ".spool").glob("unit-*.json")).write_text("[]")
    monkeypatch.undo()
    build(spec, root, False, 1)
    build(spec, tmp_path / "other", False, 1)
    assert files(root) == files(tmp_path / "other")


def test_killed_and_started_again(tmp_path: Path) -> None:
    """kill -9 of a build by two processes, once the first images are safe."""
    raw = write_class_folders(tmp_path / "raw", make_tree(train=250, val=6, sizes=[(130, 100)]))
    options = ["--source", "folder", "--path", str(raw), "--image-size", "64", "--classes-per-task", "2"]
    line = [sys.executable, "-m", "data_tools", "build", *options, "--workers", "2", "--out"]
    root = tmp_path / "killed"
    process = subprocess.Popen([*line, str(root)], cwd=REPOSITORY, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(root.glob(".spool/unit-*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    gone, alive = psutil.wait_procs(workers, timeout=20)
    assert len(gone) == 2 and not alive, "processes outlive their parent"
    kept = {path: path.stat().st_mtime_ns for path in root.glob(".spool/unit-*.json")}
    assert 0 < len(kept) < 4 and not (root / "dataset.json").exists()
    original = spool.write_unit
    made: list[str] = []
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(
        jobs, "write_unit", lambda at, images: made.extend(i[0] for i in images) or original(at, images)
    )
    spec = BuildSpec("folder", "folder", [[0, 1], [2, 3]], 64, 3, source_path=str(raw))
    build(spec, root, False, 1)
    monkeypatch.undo()
    assert len(made) == 4 * 256 - 256 * len(kept) and len(made) == len(set(made))  # what was kept is not made again
    build(spec, tmp_path / "whole", False, 1)
    assert files(root) == files(tmp_path / "whole")


def break_images(spec: BuildSpec) -> list[Path]:
    """Two training images and one test image."""
    raw = Path(spec.source_path)
    paths = [sorted((raw / "train" / wnid).iterdir())[3] for wnid in LISTED[:2]]
    paths.append(sorted((raw / "val" / LISTED[2]).iterdir())[0])
    for path in paths:
        path.write_bytes(path.read_bytes()[:200])
    return paths


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_images_are_named_counted_and_left_out_where_told_to(
    spec: BuildSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str], workers: int
) -> None:
    broken, root = break_images(spec), tmp_path / "out"
    for allowed in (0, 2):
        with pytest.raises(UserError, match="--skip-broken 3") as error:
            build(spec, root, False, workers, skip_broken=allowed)
        assert all(f"{path}: broken image" in str(error.value) for path in broken) and "\n" not in str(error.value)
        assert not (root / "dataset.json").exists() and not list(root.glob("*/*/*.tar"))
    build(spec, root, False, workers, skip_broken=3)
    told = capsys.readouterr().err
    assert all(f"left out: {path}: broken image" in told for path in broken) and told.count("\n") == 3
    assert not verify(root).damage
    counts = [len(TaskData.open(root, "train", [task], Verify.sha256)) for task in (1, 2)]
    assert counts == [23, 11] and len(TaskData.open(root, "test", [1], Verify.sha256)) == 5
    index = read_index(task_directory(root, "train", 2))
    left_out: Any = index.spec["left_out"]
    assert list(left_out) == ["train-000015"] and str(broken[1]) in left_out["train-000015"]
    build(spec, root, False, workers)  # complete: the images are not asked for again
    build(spec, tmp_path / "again", False, workers, skip_broken=9)
    assert files(root) == files(tmp_path / "again")


def test_a_mended_image_needs_no_other_to_be_read_again(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path, *_), root = break_images(spec), tmp_path / "out"
    with pytest.raises(UserError):
        build(spec, root, False, 1)
    read: list[str] = []
    original = jobs.read_place
    monkeypatch.setattr(jobs, "read_place", lambda place, file: read.append(place.file) or original(place, file))
    path.write_bytes(next(iter(TREE["train"][LISTED[0]].values())))
    with pytest.raises(UserError, match="--skip-broken 2"):
        build(spec, root, False, 1)
    assert len(read) == 3 and str(path) in read


def test_a_class_of_broken_images_alone_is_refused(spec: BuildSpec, tmp_path: Path) -> None:
    for path in (Path(spec.source_path) / "val" / LISTED[1]).iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=rf"task 2: no test image of class 1 \({LISTED[1]}\)"):
        build(spec, tmp_path / "out", False, 1, skip_broken=3)


def test_a_process_that_dies_is_one_line_and_the_next_build_goes_on(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    start = crew_module._start

    def dying() -> Any:
        process = start()
        started.append(process)
        process.kill()
        return process

    monkeypatch.setattr(crew_module, "_start", dying)
    with pytest.raises(UserError, match=r"was killed by signal 9 \(.*memory\): the same command continues") as error:
        build(spec, tmp_path / "out", False, 2)
    assert "\n" not in str(error.value) and all(process.poll() is not None for process in started)
    monkeypatch.undo()
    build(spec, tmp_path / "out", False, 2)
    assert not verify(tmp_path / "out").damage


def test_what_the_system_refuses_in_a_process_is_told_as_of_this_one(spec: BuildSpec, tmp_path: Path) -> None:
    unit = [("train-000000", spool.Place("/nowhere/a", "a"))]
    absent = str(tmp_path / "absent" / "file.tar")
    with Crew(2) as crew, pytest.raises(FileNotFoundError, match=r"absent/file\.tar"):
        work = [jobs.assemble_job(tmp_path / "x.tar", [("k", 0, spool.Piece(absent, 0, 1, "png"))])] * 2
        crew.run(work, lambda _: None)
    with Crew(2) as crew:
        broken = crew.run([jobs.encode_job(tmp_path, spec, unit)] * 3, lambda _: None)
    assert broken == [{"train-000000": "a: No such file or directory; key data.source_path"}] * 3


def test_the_options_of_the_command_line(spec: BuildSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken, root = break_images(spec), str(tmp_path / "out")
    options = ["--source", "folder", "--path", spec.source_path, "--class-list", spec.class_list]
    line = ["build", *options, "--image-size", "24", "--classes-per-task", "1", "--out", root, "--workers", "2"]
    assert main([*line, "--small-images", "enlarge"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*line, "--small-images", "enlarge", "--skip-broken", "3"]) == 0
    assert str(broken[0]) in capsys.readouterr().err
    assert main(["verify", root, "--workers", "2"]) == 0
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["spec"]["small_images"] == "enlarge"
    assert main([*line, "--skip-broken", "3"]) == 2 and "data.small_images" in capsys.readouterr().err
    for wrong in (["--workers", "-1"], ["--skip-broken", "few"]):
        assert main([*line, *wrong]) == 2
        assert "is not a whole number" in capsys.readouterr().err
