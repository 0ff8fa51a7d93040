"""What the main rank makes sure of before the ranks meet."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any

import fsspec
import pytest

from trainer.disk import DiskNeed
from trainer.errors import ConfigError, UserError
from trainer.preflight import (
    check_disk,
    check_pool_store,
    check_run,
    lock_run,
    prepare_data,
    resolve_root,
    sweep,
)
from trainer.replay.state import write_json
from trainer.replay.watch import given_up
from trainer.run import RunDir
from trainer.settings import as_plain, load_config

TINY = ["model.channels=[8,8]", "model.norm_groups=4", "data.tasks=[[0,1],[2,3]]"]


def _lock(root: str, result: multiprocessing.queues.Queue[str]) -> None:
    try:
        lock_run(RunDir(Path(root)), patience=0.5)
        result.put("locked")
    except UserError as error:
        result.put(str(error))


def test_lock_keeps_others_out_and_ends_with_its_process(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    result: multiprocessing.queues.Queue[str] = context.Queue()
    first = context.Process(target=_lock, args=(str(tmp_path / "run"), result))
    first.start()
    assert result.get(timeout=20) == "locked"
    first.join()
    lock_run(RunDir(tmp_path / "run"))  # the first one is dead
    second = context.Process(target=_lock, args=(str(tmp_path / "run"), result))
    second.start()
    assert "a live run holds this directory" in result.get(timeout=20)
    second.join()


def test_tasks_without_a_configuration_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tasks" / "1").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        check_run(load_config("digits", TINY), RunDir(tmp_path))


def test_sweep_takes_litter_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    kept = [
        run.teacher(1) / "card.json",
        run.replay(2) / ".replay-000001.tar.1.tmp",
        run.checkpoints(1) / "step-00000001",
    ]
    litter = [
        run.checkpoints(1) / ".step-00000002.77.tmp",
        run.teacher(1) / ".model.safetensors.7.tmp",
        run.supervisor(0),
    ]
    for path in (*kept, *litter):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    (run.checkpoints(1) / ".step-00000003.77.old").mkdir()
    sweep(run)
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in litter)
    assert not (run.checkpoints(1) / ".step-00000003.77.old").exists()


def test_who_gave_up_before_does_not_speak_of_this_attempt(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    elsewhere = {"pid": 7, "host": "another-node"}
    for worker, status in enumerate((elsewhere, elsewhere | {"given_up": "no device"}, {"pid": "x"}, {})):
        write_json(run.supervisor(worker), status)
    assert given_up(run) == "no device"
    sweep(run)
    assert [run.supervisor(worker).exists() for worker in range(4)] == [True, False, False, False]
    assert given_up(run) == ""


def test_disk_counts_what_is_written_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run = load_config("digits", TINY), RunDir(tmp_path)
    need = DiskNeed.of(config).total
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": need - 1})())
    with pytest.raises(UserError, match=r"GB are free; keys run\.dir"):
        check_disk(config, run)
    (tmp_path / "checkpoint").write_bytes(b"x" * 10)
    check_disk(config, run)


def test_shards_of_another_split_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config("digits", [*TINY, "data.root=shards"])
    assert prepare_data(config, progress=False).tasks == [[0, 1], [2, 3]]
    other = load_config("digits", ["data.tasks=[[4,5],[2,3]]", "data.root=shards"])
    with pytest.raises(ConfigError, match=r"another data set.*data\.tasks"):
        prepare_data(other, progress=False)


def test_root_follows_the_data_and_not_the_number_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    roots = []
    for tasks in ("[[0,1],[2,3]]", "[[0,1],[2,3],[4]]", "[[5,1]]"):
        config = load_config("digits", [f"data.tasks={tasks}"])
        resolve_root(config)
        roots.append(config.data.root)
        assert as_plain(config)["data"]["root"] == config.data.root
    assert roots[0] == roots[1] != roots[2]


def test_a_pool_store_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory: Any = fsspec.filesystem("memory")
    config, run = load_config("digits", [*TINY, "replay.store=memory://preflight/pools"]), RunDir(tmp_path / "run")
    check_pool_store(config, run)
    assert memory.find("/preflight") == []  # what was tried is gone

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(type(memory), "pipe_file", refuse)
    with pytest.raises(UserError, match=r"^memory://preflight/pools/run/.*refused"):
        check_pool_store(config, run)
    check_pool_store(load_config("digits", [*TINY, "method.name=joint"]), run)  # replays nothing
