"""Checkpoints on disk: written in the background, whole or not there, and what has changed since is found by name."""

from __future__ import annotations

import errno
import json
import pickle
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from trainer.checkpoint import CheckpointReader, CheckpointWriter, DamagedCheckpoint, Pieces, write_checkpoint
from trainer.errors import UserError

LIMIT = 60.0
NAMES = ("weights", "exp_avg")


def make_pieces(value: float = 1.0) -> Pieces:
    return {name: {"a": torch.full((3, 2), value), "b": torch.arange(5.0)} for name in NAMES}


def write(directory: Path) -> Path:
    return write_checkpoint(directory, make_pieces(), {"steps": 7, "extra": {"x": 0.1}})


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    pieces = make_pieces()
    directory = write_checkpoint(tmp_path / "checkpoint", pieces, {"steps": 7, "extra": {"x": 0.1}})
    reader = CheckpointReader(directory)
    reader.verify()
    assert (reader.state["steps"], reader.state["extra"]) == (7, {"x": 0.1})
    assert torch.equal(load_file(directory / "weights.safetensors")["a"], torch.ones(3, 2))
    for name in NAMES:
        data = (directory / f"{name}.safetensors").read_bytes()
        assert reader.state["files"][name] == {"bytes": len(data), "crc32": zlib.crc32(data)}
    assert pieces == {}, "freed"


def test_saves_are_written_one_after_another_in_the_background(tmp_path: Path) -> None:
    may_write, begun = threading.Event(), list[Path]()

    def slow(tensors: dict[str, torch.Tensor], path: Path) -> None:
        begun.append(path)
        assert may_write.wait(LIMIT)
        save_file(tensors, path)

    first, second = tmp_path / "1", tmp_path / "2"
    state = {"extra": [1]}
    with mock.patch("trainer.checkpoint.save_file", slow):
        writer = CheckpointWriter()
        writer.submit(first, make_pieces(), state)
        state["extra"].append(2)
        assert writer.published() == []
        assert not first.exists()
        threading.Timer(0.05, may_write.set).start()
        writer.submit(second, make_pieces(2.0), state)
        assert first.exists(), "the second save waits for the first"
        writer.finish()
    assert writer.published() == [first, second]
    assert writer.published() == []
    writer.close()
    assert not any(thread.name.startswith("checkpoint") for thread in threading.enumerate())
    assert CheckpointReader(first).state["extra"] == [1]
    assert [path.parent.name.split(".")[1] for path in begun] == ["1", "1", "2", "2"]


def test_closing_finishes_the_write(tmp_path: Path) -> None:
    writer = CheckpointWriter()
    writer.submit(tmp_path / "checkpoint", make_pieces(), {})
    writer.close()
    CheckpointReader(tmp_path / "checkpoint").verify()


@pytest.mark.parametrize("ask", [CheckpointWriter.published, CheckpointWriter.finish])
def test_a_full_disk_is_told_once_and_leaves_nothing(tmp_path: Path, ask: Callable[[CheckpointWriter], object]) -> None:
    """The checkpoint before stays as it is, and a later one may succeed."""
    directory = write(tmp_path / "checkpoint")

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        path.write_bytes(b"half of it")
        if path.stem == NAMES[1]:
            raise OSError(errno.ENOSPC, "No space left on device")

    writer = CheckpointWriter()
    with mock.patch("trainer.checkpoint.save_file", full):
        writer.submit(directory, make_pieces(2.0), {})
        writer.wait()
    with pytest.raises(UserError, match=r"checkpoint: the checkpoint could not be written .*No space left"):
        ask(writer)
    assert writer.published() == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    CheckpointReader(directory).verify()
    writer.submit(tmp_path / "later", make_pieces(), {})
    writer.finish()
    assert writer.published() == [tmp_path / "later"]
    writer.close()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swap(path: Path) -> None:
    other = path.with_name("weights.safetensors" if path.stem != "weights" else "exp_avg.safetensors")
    save_file({"a": torch.zeros(3, 2), "b": torch.arange(5.0)}, path)
    assert path.stat().st_size == other.stat().st_size


def make_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": [1, 2]}))


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [flip, truncate, append, swap, make_pickle, make_directory, Path.unlink])
@pytest.mark.parametrize("name", NAMES)
def test_a_changed_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    directory = write(tmp_path / "checkpoint")
    damage(directory / f"{name}.safetensors")
    with pytest.raises(DamagedCheckpoint, match=rf"checkpoint/{name}\.safetensors: "):
        CheckpointReader(directory).verify()


def test_a_pickle_with_the_right_checksum_is_refused_too(tmp_path: Path) -> None:
    """By the format itself: nothing here can unpickle."""
    directory = tmp_path / "checkpoint"
    with mock.patch("trainer.checkpoint.save_file", lambda tensors, path: make_pickle(path)):
        write(directory)
    reader = CheckpointReader(directory)
    reader.verify()
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint/weights\.safetensors: unreadable checkpoint"):
        reader.check("weights", {"a": torch.Size([3, 2])})


def test_a_changed_state_is_found_wherever_a_bit_flips(tmp_path: Path) -> None:
    """Every flip that JSON lets through, but those in white space."""
    path = write(tmp_path / "checkpoint") / "state.json"
    content, whole = path.read_bytes(), json.loads(path.read_bytes())
    refused = 0
    for place in range(len(content)):
        for bit in (1, 2, 8, 32):
            path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
            try:
                CheckpointReader(path.parent)
            except DamagedCheckpoint as error:
                assert str(path) in str(error)
                refused += 1
            else:
                assert json.loads(path.read_bytes()) == whole
    assert refused > 2 * len(content)


def rewrite(path: Path, **changes: object) -> None:
    """Change a state and make its checksum right."""
    content = json.loads(path.read_text()) | changes
    del content["check"]
    path.write_text(json.dumps(content | {"check": zlib.crc32(json.dumps(content, sort_keys=True).encode())}))


def test_another_format_is_not_damage(tmp_path: Path) -> None:
    """So it is not set aside for an older checkpoint."""
    path = write(tmp_path / "checkpoint") / "state.json"
    for change in (lambda: rewrite(path, format=3), lambda: path.write_text('{"format": 1, "steps": 7}')):
        change()
        with pytest.raises(UserError, match=r"state\.json: not a checkpoint of format 2") as caught:
            CheckpointReader(path.parent)
        assert not isinstance(caught.value, DamagedCheckpoint)


@pytest.mark.parametrize(
    "files", [[], {"../../weights": {"bytes": 1, "crc32": 1}}, {"weights": 3}, {"weights": {"bytes": "1", "crc32": 1}}]
)
def test_a_state_that_lists_something_else_is_refused(tmp_path: Path, files: object) -> None:
    path = write(tmp_path / "checkpoint") / "state.json"
    rewrite(path, files=files)
    with pytest.raises(DamagedCheckpoint, match=r"state\.json: damaged"):
        CheckpointReader(path.parent)


def test_what_the_checkpoint_never_held_is_named(tmp_path: Path) -> None:
    reader = CheckpointReader(write(tmp_path / "checkpoint"))
    with pytest.raises(UserError, match=r"ema\.safetensors: not in this checkpoint"):
        reader.check("ema", {})
    with pytest.raises(UserError, match=r"weights\.safetensors: a is \(3, 2\) there and \(2, 3\) in the model"):
        reader.check("weights", {"a": torch.Size([2, 3]), "b": torch.Size([5])})
