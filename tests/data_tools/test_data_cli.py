"""The command line, in a process of its own where its exit code counts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_tools.__main__ import main
from trainer.data.shards import read_card

REPOSITORY = Path(__file__).resolve().parents[2]


def test_build_and_verify_as_commands(npz: Path, tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "data_tools", *arguments]
        return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=False)

    root = str(tmp_path / "out")
    options = ["--source", "npz", "--path", str(npz), "--image-size", "6", "--channels", "1", "--classes-per-task", "2"]
    built = command("build", *options, "--out", root)
    assert built.returncode == 0 and built.stderr == "" and "2 tasks [[0, 1], [2, 3]]" in built.stdout
    sound = command("verify", root)
    assert sound.returncode == 0 and sound.stdout.endswith("out: sound\n")
    next((tmp_path / "out").rglob("*.tar")).unlink()
    damaged = command("verify", root)
    assert damaged.returncode == 1 and ".tar: missing\n" in damaged.stdout
    refused = command("build", *options, "--out", root, "--format", "raw")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "data.format" in refused.stderr


def test_the_split_options(npz: Path, tmp_path: Path) -> None:
    def tasks(name: str, *options: str) -> list[list[int]]:
        source = ["--source", "npz", "--path", str(npz), "--image-size", "6", "--channels", "1"]
        assert main(["build", *source, "--out", str(tmp_path / name), *options]) == 0
        return read_card(tmp_path / name).tasks

    assert tasks("a", "--classes-per-task", "1", "--class-order", "3,1,0,2") == [[3], [1], [0], [2]]
    assert tasks("b", "--tasks", "[[2], [0, 1]]") == [[2], [0, 1]]
    shuffled = tasks("c", "--classes-per-task", "2", "--class-order-seed", "5")
    assert sorted(label for task in shuffled for label in task) == [0, 1, 2, 3]
    assert tasks("d", "--classes-per-task", "2", "--class-order-seed", "5") == shuffled


def test_the_default_root_and_native_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["build", "--source", "digits", "--classes-per-task", "5"]) == 0
    root = Path(capsys.readouterr().out.split(":")[0])
    card = read_card(root)
    assert root.name.startswith("digits-8-") and (card.image_size, card.channels, len(card.tasks)) == (8, 1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: command"),
        (["bild"], "invalid choice: 'bild'"),
        (["build", "--source", "digits", "--bogus", "1"], "unrecognized arguments: --bogus 1"),
        (["build", "--source", "svhn"], "invalid choice: 'svhn'"),
        (["build", "--source", "digits", "--image-size", "big"], "invalid int value: 'big'"),
        (["build", "--source", "digits"], "--classes-per-task or --tasks"),
        (["build", "--source", "npz", "--tasks", "[[0]]"], "--image-size: must be given"),
        (["build", "--source", "digits", "--tasks", "[0,1]"], "--tasks [0,1]: not of the form"),
        (["build", "--source", "digits", "--tasks", '[["a"]]'], "class ids are whole numbers"),
        (["build", "--source", "digits", "--tasks", "[[0"], "--tasks [[0: not of the form"),
        (["build", "--source", "digits", "--tasks", "[[0]]", "--classes-per-task", "2"], "--tasks: goes without"),
        (["build", "--source", "digits", "--classes-per-task", "2", "--class-order", "a"], "--class-order a: not of"),
        (["build", "--source", "digits", "--classes-per-task", "3"], "data.classes_per_task=3"),
        (["build", "--source", "digits", "--image-size", "0", "--tasks", "[[0]]"], "data.image_size=0"),
        (["build", "--source", "folder", "--image-size", "8", "--tasks", "[[0]]"], "data.source_path is empty"),
        (["verify", "nowhere"], "nowhere/dataset.json: missing"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
