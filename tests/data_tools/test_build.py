"""Building: split, bytes, increments, refusals."""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_data import raw, write_folder

from data_tools import build as build_module
from data_tools.build import build
from data_tools.lock import root_lock
from data_tools.spec import BuildSpec, default_root
from data_tools.verify import verify
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.shards import read_card, read_index, task_directory
from trainer.errors import ConfigError, UserError

TASKS = [[2, 0], [1, 3]]


@pytest.fixture
def spec(npz: Path) -> BuildSpec:
    return BuildSpec("tiny", "npz", TASKS, image_size=6, channels=1, source_path=str(npz), classes=4, shard_size=5)


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("format", ["png", "raw"])
def test_what_is_built_reads_as_the_raw_images(spec: BuildSpec, tmp_path: Path, format: str) -> None:
    card = build(replace(spec, format=format), tmp_path / "out", progress=False)
    assert card.tasks == TASKS and card.classes == ["0", "1", "2", "3"]
    with np.load(spec.source_path) as archive:
        for split, count in (("train", 8), ("test", 3)):
            images, labels = archive[f"x_{split}"], archive[f"y_{split}"]
            for task, classes in enumerate(TASKS, 1):
                data = TaskData.open(tmp_path / "out", split, [task], Verify.sha256)
                assert data.classes == sorted(classes) and len(data) == 2 * count
                ids = np.array([int(key.removeprefix(f"{split}-")) for key in data.sample_keys])
                assert np.array_equal(data.read(np.arange(len(data)))[:, 0], images[ids][..., 0])
                assert np.array_equal(data.labels, labels[ids])
                assert ids.tolist() != sorted(ids.tolist())  # shuffled, not in the order of the source


def test_building_twice_gives_the_same_bytes(spec: BuildSpec, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build(spec, tmp_path / name, progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    shards = [entry.count for entry in read_index(task_directory(tmp_path / "a", "train", 1)).shards]
    assert shards == [5, 5, 5, 1]


def test_a_task_appended_is_built_and_the_rest_is_kept(spec: BuildSpec, tmp_path: Path) -> None:
    root = tmp_path / "out"
    build(replace(spec, tasks=TASKS[:1]), root, progress=False)
    before = files(root)
    stamps = {name: (root / name).stat().st_mtime_ns for name in before}
    card = build(spec, root, progress=False)
    assert card.tasks == TASKS
    kept = {name for name in before if "task-01" in name}
    assert kept and all((root / name).stat().st_mtime_ns == stamps[name] for name in kept)
    build(spec, tmp_path / "at once", progress=False)
    assert files(root) == files(tmp_path / "at once")


def test_fewer_tasks_than_built_ask_for_nothing(spec: BuildSpec, tmp_path: Path) -> None:
    build(spec, tmp_path, progress=False)
    before = files(tmp_path)
    assert build(replace(spec, tasks=TASKS[:1]), tmp_path, progress=False).tasks == TASKS
    assert files(tmp_path) == before


def test_raw_images_are_not_needed_where_all_is_built(spec: BuildSpec, tmp_path: Path) -> None:
    build(spec, tmp_path, progress=False)
    Path(spec.source_path).unlink()
    build(spec, tmp_path, progress=False)
    build(replace(spec, source_path="/another/machine.npz"), tmp_path, progress=False)
    with pytest.raises(UserError, match=r"raw\.npz: missing"):
        build(spec, tmp_path / "new", progress=False)


def test_a_directory_that_lacks_a_shard_or_index_is_built_again(spec: BuildSpec, tmp_path: Path) -> None:
    build(spec, tmp_path, progress=False)
    whole = files(tmp_path)
    first = task_directory(tmp_path, "train", 1)
    (first / "train-01-00001.tar").unlink()
    (task_directory(tmp_path, "test", 2) / "index.json").unlink()
    (first / ".train-01-00009.tar.1.tmp").write_bytes(b"left by a killed build")
    build(spec, tmp_path, progress=False)
    assert files(tmp_path) == whole


def test_an_interrupted_build_is_continued(spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = []
    original = build_module.write_shard

    def failing(path: Path, *arguments: Any) -> Any:
        written.append(path)
        if len(written) == 6:
            raise KeyboardInterrupt
        return original(path, *arguments)

    monkeypatch.setattr(build_module, "write_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        build(spec, tmp_path / "a", progress=False)
    assert not (tmp_path / "a" / "dataset.json").exists()
    with pytest.raises(UserError, match=r"dataset\.json: missing"):
        TaskData.open(tmp_path / "a", "train", [1], Verify.size)
    monkeypatch.undo()
    build(spec, tmp_path / "a", progress=False)
    build(spec, tmp_path / "b", progress=False)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({"image_size": 4}, ["data.image_size (built with 6, wanted 4)"]),
        ({"format": "raw", "shard_size": 9}, ["data.format", "data.shard_size"]),
        ({"channels": 3, "name": "other"}, ["data.channels", "data.name"]),
        ({"tasks": [[0, 2], [1, 3]]}, ["data.tasks"]),
        ({"tasks": [[2, 0], [1], [3]]}, ["data.tasks"]),
        ({"classes": 3}, ["data.classes"]),
    ],
)
def test_another_data_set_in_the_root_is_refused_by_key(
    spec: BuildSpec, tmp_path: Path, changes: dict[str, Any], keys: list[str]
) -> None:
    build(spec, tmp_path, progress=False)
    before = files(tmp_path)
    with pytest.raises(ConfigError) as error:
        build(replace(spec, **changes), tmp_path, progress=False)
    assert all(key in str(error.value) for key in keys) and "data.root" in str(error.value)
    assert "\n" not in str(error.value) and files(tmp_path) == before


def test_another_spec_is_refused_after_an_interrupted_build_too(spec: BuildSpec, tmp_path: Path) -> None:
    build(spec, tmp_path, progress=False)
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(ConfigError, match=r"task-01: .*data\.image_size"):
        build(replace(spec, image_size=4), tmp_path, progress=False)
    with pytest.raises(ConfigError, match=r"task-01: .*data\.tasks"):
        build(replace(spec, tasks=[[0, 1]]), tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": [[0, 4]]}, r"data\.tasks: class 4 of task 1"),
        ({"tasks": [[0, 1], [1]]}, r"data\.tasks: class 1 occurs twice"),
        ({"tasks": [[0], []]}, r"data\.tasks: task 2 has no class"),
        ({"tasks": []}, r"data\.tasks: there is no task"),
        ({"classes": 5}, r"data\.classes=5: there are 4 classes"),
        ({"channels": 2}, r"data\.channels=2"),
        ({"image_size": 0}, r"data\.image_size=0"),
        ({"shard_size": 0}, r"data\.shard_size=0"),
        ({"format": "bmp"}, r"data\.format=bmp"),
        ({"name": "../x"}, r"data\.name='\.\./x'"),
        ({"source": "svhn"}, r"data\.source=svhn"),
        ({"class_list": "/none.txt"}, r"data\.class_list=/none\.txt: unreadable"),
    ],
)
def test_impossible_specs_are_refused_by_key(
    spec: BuildSpec, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(replace(spec, **changes), tmp_path / "out", progress=False)
    assert not list((tmp_path / "out").rglob("*.tar"))


def test_a_class_list_orders_any_source_and_may_grow(spec: BuildSpec, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("3\n1\n")
    spec = replace(spec, class_list=str(listed), tasks=[[0]], classes=2)
    assert build(spec, tmp_path / "out", progress=False).classes == ["3", "1"]
    ids = [int(key[6:]) for key in TaskData.open(tmp_path / "out", "train", [1], Verify.size).sample_keys]
    with np.load(spec.source_path) as archive:
        assert set(archive["y_train"][ids]) == {3}
    root = default_root("tiny", spec)
    listed.write_text("3\n1\n0\n")
    longer = replace(spec, tasks=[[0], [2, 1]], classes=3)
    card = build(longer, tmp_path / "out", progress=False)
    assert card.classes == ["3", "1", "0"] and card.tasks == [[0], [2, 1]] and default_root("tiny", longer) == root
    listed.write_text("1\n3\n0\n")
    with pytest.raises(ConfigError, match=r"data\.class_list \(names other classes or another order\)"):
        build(longer, tmp_path / "out", progress=False)


@pytest.mark.parametrize(
    ("text", "message"), [("0\n9\n", "'9' is not a class"), ("0\n0\n", "'0' occurs twice"), ("", "it is empty")]
)
def test_wrong_class_lists_are_refused(spec: BuildSpec, tmp_path: Path, text: str, message: str) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text(text)
    with pytest.raises(ConfigError, match=rf"data\.class_list=.*classes\.txt: {message}"):
        build(replace(spec, class_list=str(listed), tasks=[[0]], classes=0), tmp_path / "out", progress=False)


def test_a_new_class_folder_sorted_before_others_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "raw", raw(6, 3, 2), ["b", "c"])
    spec = BuildSpec("f", "folder", [[0]], image_size=6, channels=3, source_path=str(tmp_path / "raw"))
    build(spec, tmp_path / "out", progress=False)
    write_folder(tmp_path / "raw", raw(6, 3, 1), ["d"])
    assert build(replace(spec, tasks=[[0], [2]]), tmp_path / "out", progress=False).classes == ["b", "c", "d"]
    write_folder(tmp_path / "raw", raw(6, 3, 1), ["a"])
    with pytest.raises(ConfigError, match="other classes than those built"):
        build(replace(spec, tasks=[[0], [2], [1]]), tmp_path / "out", progress=False)


def test_a_class_without_images_is_named(spec: BuildSpec, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "hole.npz",
        x_train=np.zeros((3, 6, 6), np.uint8),
        y_train=np.array([0, 0, 2]),
        x_test=np.zeros((3, 6, 6), np.uint8),
        y_test=np.array([0, 1, 2]),
    )
    spec = replace(spec, source_path=str(tmp_path / "hole.npz"), tasks=[[0, 2], [1]], classes=3)
    with pytest.raises(UserError, match=r"task 2: no train image of class 1 \(1\); key data\.source_path"):
        build(spec, tmp_path / "out", progress=False)


def test_all_broken_images_of_a_task_are_named_and_nothing_is_published(tmp_path: Path) -> None:
    write_folder(tmp_path / "raw", raw(6, 3, 2, train=9), ["a", "b"])
    broken = [tmp_path / "raw" / "train" / "a" / f"{row:03d}.png" for row in (0, 8)]
    for path in broken:
        path.write_bytes(b"no image")
    spec = BuildSpec("f", "folder", [[0, 1]], 6, 3, source_path=str(tmp_path / "raw"), shard_size=3)
    with pytest.raises(UserError) as error:
        build(spec, tmp_path / "out", progress=False)
    assert all(str(path) in str(error.value) for path in broken) and "\n" not in str(error.value)
    assert not (task_directory(tmp_path / "out", "train", 1) / "index.json").exists()
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_a_full_disk_or_a_file_in_the_way_is_one_line(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*; key data\.root"):
        build(spec, tmp_path / "file", progress=False)

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(build_module, "write_shard", full)
    with pytest.raises(UserError, match=r"out: No space left on device; key data\.root"):
        build(spec, tmp_path / "out", progress=False)


def test_two_builders_at_once_make_one_data_set(
    spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first and finds everything built."""
    written: list[Path] = []
    errors: list[Exception] = []
    original = build_module.write_shard
    monkeypatch.setattr(build_module, "write_shard", lambda *args: written.append(args[0]) or original(*args))

    def builder() -> None:
        try:
            build(spec, tmp_path / "a", progress=False)
        except UserError as error:
            errors.append(error)

    threads = [threading.Thread(target=builder) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and not verify(tmp_path / "a").damage
    assert len(written) == len(set(written)) == len(list((tmp_path / "a").rglob("*.tar")))


def test_a_lock_that_is_held_too_long_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (
        root_lock(tmp_path),
        pytest.raises(UserError, match=r"\.lock: another build holds it.*key data\.root"),
        root_lock(tmp_path, patience=0.3),
    ):
        pass
    assert "waiting for another build" in capsys.readouterr().err
    with root_lock(tmp_path, patience=0):  # it ended with its holder
        pass


def test_default_roots(spec: BuildSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = default_root("tiny", spec)
    assert root.parent == Path("data") and root.name.startswith("tiny-6-") and len(root.name) == len("tiny-6-") + 8
    assert default_root("tiny", replace(spec, tasks=TASKS[:1])) == root  # a task appended finds the same root
    for changes in ({"image_size": 4}, {"tasks": [[0, 2], [1, 3]]}, {"format": "raw"}, {"source_path": "x"}):
        assert default_root("tiny", replace(spec, **changes)) != root
    other = replace(spec, tasks=[[2, 0], [3, 1]])  # the same first task, then another split
    assert default_root("tiny", other) == root
    build(spec, root, progress=False)
    assert default_root("tiny", spec) == root
    second = default_root("tiny", other)
    assert second.name == f"{root.name}-2"
    build(other, second, progress=False)
    assert default_root("tiny", other) == second and read_card(second).tasks == other.tasks


def test_the_index_is_self_describing(spec: BuildSpec, tmp_path: Path) -> None:
    build(spec, tmp_path, progress=False)
    content = json.loads((task_directory(tmp_path, "test", 1) / "index.json").read_text())
    assert content["classes"] == [2, 0] and content["names"] == ["2", "0"] and content["spec"]["source"] == "npz"
    shard = content["shards"][0]
    data = (task_directory(tmp_path, "test", 1) / shard["name"]).read_bytes()
    assert hashlib.sha256(data).hexdigest() == shard["sha256"] and len(data) == shard["bytes"]
    first, size = shard["offsets"][0]["cls"]
    assert int(data[first : first + size]) == shard["labels"][0]
