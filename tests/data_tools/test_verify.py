"""The verifier finds what a reader would trip over."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_tools.build import build
from data_tools.spec import BuildSpec
from data_tools.verify import print_report, verify
from trainer.data.shards import task_directory
from trainer.errors import UserError


@pytest.fixture
def root(npz: Path, tmp_path: Path) -> Path:
    spec = BuildSpec("tiny", "npz", [[0, 1], [2, 3]], 6, 1, source_path=str(npz), shard_size=6)
    build(spec, tmp_path / "out", progress=False)
    return tmp_path / "out"


def test_a_sound_data_set(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = verify(root)
    assert report.damage == []
    assert [(row.split, row.task, row.per_class) for row in report.rows] == [
        ("train", 1, {0: 8, 1: 8}),
        ("test", 1, {0: 3, 1: 3}),
        ("train", 2, {2: 8, 3: 8}),
        ("test", 2, {2: 3, 3: 3}),
    ]
    print_report(report)
    assert capsys.readouterr().out.endswith("out: sound\n")


def rewrite(root: Path, change: Callable[[dict[str, Any], Path], None]) -> None:
    """Change the index of train/task-01."""
    directory = task_directory(root, "train", 1)
    content = json.loads((directory / "index.json").read_text())
    change(content, directory)
    (directory / "index.json").write_text(json.dumps(content))


def reseal(index: dict[str, Any], directory: Path, change: Callable[[dict[str, bytes]], None]) -> None:
    """Change the members of the first shard and write index entries that match its bytes and offsets."""
    entry = index["shards"][0]
    path = directory / entry["name"]
    with tarfile.open(path) as tar:
        contents: dict[str, Any] = {member.name: tar.extractfile(member) for member in tar}
        members = {name: file.read() for name, file in contents.items()}
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        spans = {member.name: [member.offset_data, member.size] for member in tar}
    entry["offsets"] = [{e: spans[f"{key}.{e}"] for e in ("png", "cls")} for key in entry["keys"]]
    entry["bytes"], entry["sha256"] = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def first_key(index: dict[str, Any]) -> str:
    return index["shards"][0]["keys"][0]


DAMAGES: list[tuple[Callable[[dict[str, Any], Path], Any], str]] = [
    (lambda index, at: (at / "train-01-00001.tar").unlink(), "train-01-00001.tar: missing"),
    (lambda index, at: (at / "train-01-00001.tar").write_bytes(b""), "train-01-00001.tar: 0 bytes"),
    (lambda index, at: (at / "stray.tar").write_bytes(b""), "stray.tar is not in the index"),
    (lambda index, at: index.update(classes=[0]), "are not those of dataset.json"),
    (lambda index, at: index.update(classes=[0, 1, 2]), "holds classes [0, 1], [0, 1, 2] expected"),
    (lambda index, at: index["shards"][0].update(labels=[]), "the index has no labels"),
    (lambda index, at: index["shards"].pop(0), "train-01-00000.tar is not in the index"),
    (lambda index, at: index["shards"].append(index["shards"][0]), "occurs 2 times"),
    (lambda index, at: index["shards"][0]["offsets"][0].update(cls=[0, 1]), "members are not where the index says"),
    (
        lambda index, at: reseal(index, at, lambda members: members.update({f"{first_key(index)}.png": b"x"})),
        "not a readable png",
    ),
    (
        lambda index, at: reseal(index, at, lambda members: members.update({f"{first_key(index)}.cls": b"7"})),
        "needs one image and the label",
    ),
]


@pytest.mark.parametrize(("change", "message"), DAMAGES)
def test_damage_is_one_line_each(
    root: Path, capsys: pytest.CaptureFixture[str], change: Callable[[dict[str, Any], Path], Any], message: str
) -> None:
    rewrite(root, change)
    report = verify(root)
    assert any(message in line for line in report.damage)
    assert all("train/task-01" in line and "\n" not in line for line in report.damage)
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("damaged") and report.damage == lines[-1 - len(report.damage) : -1]


def test_a_flipped_bit_is_found(root: Path) -> None:
    path = task_directory(root, "test", 2) / "test-02-00000.tar"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # in the padding, where no image would show it
    path.write_bytes(data)
    assert verify(root).damage == [f"{path}: corrupt (its sha256 is not the one of the index)"]


def test_a_missing_index_does_not_hide_the_rest(root: Path) -> None:
    (task_directory(root, "train", 1) / "index.json").unlink()
    report = verify(root)
    assert len(report.damage) == 1 and "train/task-01/index.json: missing" in report.damage[0] and len(report.rows) == 3


def test_no_data_set_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: missing"):
        verify(tmp_path)
