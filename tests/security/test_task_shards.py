"""Hostile task shards: refused in one line, nothing unpickled, extracted, waited for or unpacked."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools.verify import verify
from tests.fuzz.test_task_shards import LABELS, SIZE, make, seal
from tests.security.hostile import (
    NO_FILES,
    QUICK,
    TEN_GB,
    Trap,
    huge_npy,
    huge_webp,
    little_memory,
    no_file,
    pickled,
    pickled_npy,
    pixel_bomb,
    png,
    refused,
    sparse,
    tar_header,
    tar_of,
    text_bomb,
    zeros,
)
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.images import decode_image
from trainer.data.shards import DATASET_NAME, INDEX_NAME, read_card, read_index
from trainer.errors import UserError

pytestmark = QUICK
SHARD = "train-01-00000.tar"


def load(root: Path) -> Any:
    data = TaskData.open(root, "train", [1], Verify.sha256)
    return data.read(np.arange(len(data)))


def change(directory: Path, **fields: Any) -> None:
    """Change the index's entry of the only shard."""
    index = json.loads((directory / INDEX_NAME).read_bytes())
    index["shards"][0].update(fields)
    (directory / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("npy", pickled_npy),
        ("npy", pickled),
        ("npy", lambda trap: huge_npy("|u1", (1, SIZE, SIZE))),
        ("png", pickled),
        ("png", lambda trap: pixel_bomb(SIZE, 2**31 - 1)),
        ("png", lambda trap: pixel_bomb(30_000, 30_000)),
        ("png", lambda trap: text_bomb(SIZE, 200)),
        ("webp", lambda trap: huge_webp()),
    ],
)
def test_members_made_to_hurt(tmp_path: Path, trap: Trap, extension: str, content: Any) -> None:
    """The index vouches for the shard: only the image itself is wrong."""
    directory = make(tmp_path, extension)
    data = content(trap)
    members = [(f"train-{row:06d}.{extension}", data) for row in range(len(LABELS))]
    shard = tar_of(members)
    (directory / SHARD).write_bytes(shard)
    offsets = [{extension: [shard.index(data), len(data)]}] * len(LABELS)
    change(directory, offsets=offsets)
    seal(directory, directory / SHARD)
    assert "sample train-000000" in refused(lambda: load(tmp_path), UserError, SHARD)


def test_pixels_that_unpack_to_more_than_promised_are_cut_off() -> None:
    """Rows without end behind the header of a small image."""
    bomb = png(SIZE, SIZE, packed=zeros(200))
    with little_memory(100 << 20):
        image = decode_image(bomb, "png", SIZE, 1)
    assert image.shape == (1, SIZE, SIZE) and not image.any()


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", ".", "", "a\x00b", "a\nb", "x/../y.tar"])
def test_an_index_that_names_other_files(tmp_path: Path, name: str) -> None:
    directory = make(tmp_path, "png")
    change(directory, name=name)
    assert "not a plain file name" in refused(lambda: load(tmp_path), UserError, str(directory / INDEX_NAME))


def test_an_index_with_keys_that_climb(tmp_path: Path) -> None:
    directory = make(tmp_path, "png")
    change(directory, keys=["../x", "b", "c", "d", "e"])
    refused(lambda: load(tmp_path), UserError, str(directory / INDEX_NAME))


@NO_FILES
@pytest.mark.parametrize("entry", [{}, {"bytes": 0, "count": 0, "keys": [], "offsets": [], "labels": []}])
def test_a_shard_that_is_no_file(tmp_path: Path, kind: str, entry: dict[str, Any]) -> None:
    directory = make(tmp_path, "png")
    change(directory, **entry)
    no_file(directory / SHARD, kind)
    refused(lambda: load(tmp_path), UserError, str(directory))


@NO_FILES
@pytest.mark.parametrize(("name", "read"), [(INDEX_NAME, read_index), (DATASET_NAME, read_card)])
def test_an_index_or_a_card_that_is_no_file(tmp_path: Path, kind: str, name: str, read: Any) -> None:
    refused(lambda: read(tmp_path), UserError, str(no_file(tmp_path / name, kind)))


@pytest.mark.parametrize(("name", "read"), [(INDEX_NAME, read_index), (DATASET_NAME, read_card)])
def test_an_index_or_a_card_too_large_or_too_deep(tmp_path: Path, name: str, read: Any) -> None:
    path = tmp_path / name
    for text in ("[" * 10**6, '{"a":' * 10**6):
        path.write_text(text)
        refused(lambda: read(tmp_path), UserError, str(path))
    sparse(path)
    refused(lambda: read(tmp_path), UserError, str(path))


def test_a_member_of_ten_gigabytes(tmp_path: Path) -> None:
    """Even where the shard is that large."""
    directory = make(tmp_path, "png")
    sparse(directory / SHARD)
    change(directory, bytes=TEN_GB, offsets=[{"png": [0, TEN_GB]}] * len(LABELS))
    read = lambda: TaskData.open(tmp_path, "train", [1], Verify.size).read(np.arange(1))  # noqa: E731
    refused(read, UserError, str(directory / INDEX_NAME))


def append_members(root: Path, members: list[bytes]) -> None:
    """Put headers behind the last image of a data set's shard; the images stay what they were."""
    directory = make(root, "png")
    path = directory / SHARD
    whole = load(root)
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1]
    path.write_bytes(path.read_bytes()[: last.offset_data + 512] + b"".join(members) + bytes(1024))
    seal(directory, path)
    assert np.array_equal(load(root), whole)


def test_extended_headers_without_end_end(tmp_path: Path) -> None:
    """Some versions of Python call a chain of them damage, others the end of the tar; none follows it for long."""
    append_members(tmp_path, [tar_header("x", 10**6, b"x")] * 2000)
    assert all("\n" not in line for line in verify(tmp_path).damage)


@pytest.mark.parametrize(
    "members",
    [
        [tar_header("train-000000.png", TEN_GB)],
        [tar_header("train-000000.png", -512)] * 4,
        [tar_header("x", TEN_GB, b"L")],
        [tar_header("../../x", 0)],
        [tar_header("/etc/passwd", 0)],
        [tar_header("train-000000.png", 0, b"2", "../../etc/passwd")],
        [tar_header("train-000000.png", 0, b"1", "/etc/passwd")],
        [tar_header("payload.pkl", 0)],
    ],
)
def test_tars_with_hostile_headers_are_damage_to_the_verifier(tmp_path: Path, members: list[bytes]) -> None:
    """The reader of task shards never looks at a tar's headers: it reads the images at their offsets."""
    append_members(tmp_path, members)
    lines = [line for line in verify(tmp_path).damage if SHARD in line]
    assert len(lines) == 1 and len(lines[0].splitlines()) == 1
    assert not (tmp_path / "x").exists()
