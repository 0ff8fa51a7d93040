"""The journal of a pool: what any reader makes of it after crashes, flipped bits, cuts and replacements."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.data.shards import append_line
from trainer.errors import UserError
from trainer.replay.decode import shard_name
from trainer.replay.manifest import MANIFEST_SCHEMA, Manifest, ShardLine, new_id, seal, unseal


def shard_line(shard: int, id: str = "", **changes: Any) -> ShardLine:
    content: dict[str, Any] = {
        "id": id or new_id(),
        "shard": shard,
        "name": shard_name(shard),
        "count": 6,
        "points": 18,
        "bytes": 10240,
        "crc32": 1,
        "sha256": "a" * 64,
        "teacher_id": "b" * 64,
        "sampler": {"steps": 4},
        "micro_batch": 4,
        "evaluations": 42,
        "seconds": 0.25,
        "worker": shard % 2,
    }
    return ShardLine(**(content | changes))


def view(directory: Path) -> Manifest:
    manifest = Manifest(directory)
    manifest.refresh()
    return manifest


def state(manifest: Manifest) -> Any:
    counts = manifest.evaluations, manifest.redone, manifest.retired
    return {shard: line.id for shard, line in manifest.shards.items()}, manifest.micro_batches, manifest.newest, counts


def test_lines_carry_the_checksum_of_their_content() -> None:
    sealed = seal({"shard": 3, "id": "x"})
    assert json.loads(sealed)["check"] == zlib.crc32(b'{"id":"x","shard":3}')
    assert unseal(sealed) == {"shard": 3, "id": "x"}
    assert unseal(b'{"id":"x","shard":3}') is None and unseal(b"[1]") is None and unseal(b"[" * 100000) is None


def test_no_flipped_bit_goes_unseen(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    manifest.publish(shard_line(0))
    whole = manifest.path.read_bytes()
    for place in range(8 * (len(whole) - 1)):
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        assert unseal(damaged) is None
    manifest.path.write_bytes(whole.rstrip() + b"\x0b" + whole)  # the end of a line, and with it two lines
    assert not view(tmp_path).shards


def test_only_the_publication_that_is_named_is_taken_back(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    first, second = shard_line(0), shard_line(0, micro_batch=2)
    manifest.publish(first)
    assert manifest.refresh() and not manifest.refresh()
    manifest.publish(second)
    manifest.redo(0, first.id, "late")
    assert manifest.refresh() and manifest.shards == {0: second} and manifest.redone == 0
    manifest.redo(0, second.id, "corrupt")
    manifest.redo(0, second.id, "corrupt, says another")
    assert not manifest.refresh() and not manifest.shards and manifest.redone == 1
    manifest.publish(third := shard_line(0, micro_batch=1))
    manifest.retire(0, second.id)
    manifest.refresh()
    assert manifest.shards == {0: third} and (manifest.retired, manifest.evaluations) == (0, 3 * 42)
    manifest.retire(0, third.id)
    manifest.refresh()
    assert not manifest.shards and manifest.retired == 1 and manifest.micro_batches == {0: 1}


def test_the_newest_line_of_each_worker_says_its_micro_batch(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    for shard, micro_batch in ((0, 8), (1, 4), (2, 2), (3, 4)):
        manifest.publish(shard_line(shard, micro_batch=micro_batch))
    manifest.refresh()
    assert manifest.newest == {0: 2, 1: 4} and manifest.micro_batches == {0: 8, 1: 4, 2: 2, 3: 4}


@pytest.mark.parametrize("how", ["cut", "cut and longer", "replaced", "deleted"])
def test_a_file_that_is_not_the_one_that_was_read_is_read_from_its_start(tmp_path: Path, how: str) -> None:
    manifest = Manifest(tmp_path)
    for shard in range(4):
        manifest.publish(shard_line(shard))
    manifest.refresh()
    lines = manifest.path.read_bytes().split(b"\n")[:-1]
    if how == "cut":
        manifest.path.write_bytes(lines[0] + b"\n")
    elif how == "cut and longer":
        with manifest.path.open("r+b") as file:
            file.truncate(len(lines[0]) + 1)
        for shard in range(10, 16):
            manifest.publish(shard_line(shard))
    elif how == "replaced":
        other = tmp_path / "other"
        other.write_bytes(b"\n".join(lines) + b"\n")
        other.replace(manifest.path)
        manifest.retire(2, manifest.shards[2].id)
    else:
        manifest.path.unlink()
    news = manifest.refresh()
    assert news == (how == "cut and longer")
    left = {"cut": {0}, "cut and longer": {0, *range(10, 16)}, "replaced": {0, 1, 3}, "deleted": set()}
    assert manifest.shards.keys() == left[how] and state(manifest) == state(view(tmp_path))
    manifest.publish(shard_line(20))
    assert manifest.refresh() and 20 in manifest.shards


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../../etc/passwd"},
        {"name": "replay-000001.tar"},
        {"shard": -1, "name": "replay--00001.tar"},
        {"shard": "0"},
        {"shard": True},
        {"bytes": -1},
        {"bytes": 1.0},
        {"crc32": None},
        {"micro_batch": 0},
        {"seconds": 1},
        {"sampler": []},
        {"id": ""},
        {"surplus": 1},
        {"event": "published"},
        {"event": ["redo"]},
    ],
)
def test_a_line_that_is_whole_but_nonsense_counts_as_never_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    manifest = Manifest(tmp_path)
    append_line(manifest.path, seal(vars(shard_line(0)) | changes))
    content = vars(shard_line(1))
    del content["crc32"]
    append_line(manifest.path, seal(content))
    manifest.publish(shard_line(5))
    assert manifest.refresh() and manifest.shards.keys() == {5}


def test_a_line_of_another_schema_is_named_but_not_a_damaged_one(tmp_path: Path) -> None:
    manifest = Manifest(tmp_path)
    old = json.dumps(vars(shard_line(0)) | {"schema": 1}).encode()
    manifest.path.write_bytes(old + b"\n")
    assert not view(tmp_path).shards  # it has no checksum
    append_line(manifest.path, seal(vars(shard_line(0)) | {"schema": 3}))
    with pytest.raises(UserError, match=rf"{manifest.path}: schema 3, this program reads {MANIFEST_SCHEMA}"):
        view(tmp_path)


ACTIONS = ("publish", "publish", "redo", "retire", "stale redo", "torn", "flip", "look", "cut", "replace")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 5), st.integers(0, 10**6)), max_size=40))
def test_a_reader_at_any_time_sees_what_a_new_one_does(
    tmp_path_factory: pytest.TempPathFactory, actions: list[tuple[str, int, int]]
) -> None:
    directory = tmp_path_factory.mktemp("pool")
    path = Manifest(directory).path
    old, given = Manifest(directory), dict[int, list[str]]()
    path.touch()
    for action, shard, number in actions:
        ids, size = given.setdefault(shard, []), path.stat().st_size
        if action == "publish":
            ids.append(new_id())
            old.publish(shard_line(shard, ids[-1]))
        elif action in ("redo", "retire", "stale redo") and ids:
            id = ids[number % len(ids)] if action == "stale redo" else ids[-1]
            old.retire(shard, id) if action == "retire" else old.redo(shard, id, "because")
        elif action == "torn":
            with path.open("ab") as file:
                file.write(seal(vars(shard_line(shard)))[: number % 200])
        elif action == "flip" and size:
            data = bytearray(path.read_bytes())
            data[number % size] ^= 1 << number % 8
            path.write_bytes(data)
            old = Manifest(directory)  # what an earlier reader knew of a line that was damaged later stays known
        elif action == "look":
            old.refresh()
        elif action == "cut":
            with path.open("r+b") as file:
                file.truncate(number % (size + 1))
        elif action == "replace":
            other = directory / "other"
            other.write_bytes(path.read_bytes()[number % (size + 1) :])
            other.replace(path)
    old.refresh()
    assert state(old) == state(view(directory))
    assert all(line.id in given[shard] for shard, line in old.shards.items())
