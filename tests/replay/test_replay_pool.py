"""The pool: shards that any WebDataset reader understands, identical when made again, checked before use."""

from __future__ import annotations

import errno
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset

from trainer.config import Points
from trainer.data.shards import append_line
from trainer.errors import UserError
from trainer.replay import lock, sidecar
from trainer.replay.decode import Corrupt, DecodedShard, decode, shard_name
from trainer.replay.events import count_events
from trainer.replay.lock import refuse, worker_lock
from trainer.replay.manifest import Manifest, seal, unseal
from trainer.replay.pool import discard
from trainer.replay.state import read_json, write_json
from trainer.replay.told import Told


def read_manifest(workplace: Any) -> Manifest:
    manifest = Manifest(workplace.run.replay(2))
    manifest.refresh()
    return manifest


def load(workplace: Any, shard: int) -> DecodedShard:
    return decode(workplace.request, shard, workplace.files()[shard_name(shard)])


def test_webdataset_reads_a_shard(workplace: Any) -> None:
    workplace.fill(1)
    samples = list(webdataset.WebDataset(str(workplace.run.replay(2) / shard_name(0)), shardshuffle=False))
    assert [json.loads(sample["json"])["trajectory"] for sample in samples] == list(range(6))
    end = np.load(io.BytesIO(samples[2]["end.npy"]), allow_pickle=False)
    targets = np.load(io.BytesIO(samples[2]["targets.npy"]), allow_pickle=False)
    assert end.shape == (1, 8, 8) and targets.shape == (3, 1, 8, 8) and end.dtype == targets.dtype == np.float16
    decoded = load(workplace, 0)
    assert decoded.end is not None and decoded.states is None and decoded.targets is not None
    assert np.array_equal(decoded.end[2], end) and np.array_equal(decoded.targets[2], targets)
    record = json.loads(samples[2]["json"])
    assert record["label"] == decoded.label[2] and record["seeds"] == decoded.seeds[2].tolist()


@pytest.mark.parametrize("points", list(Points))
def test_shards_do_not_depend_on_the_number_of_samplers(make_workplace: Callable[..., Any], points: Points) -> None:
    alone, shared = make_workplace("alone", points=points), make_workplace("shared", points=points)
    assert alone.fill() == 9
    for worker in (2, 0, 1):
        sampler = shared.sampler(worker, 3)
        while (shard := sampler.next_shard(sampler.current_request())) is not None:
            sampler.make_shard(shared.request, shard)
        assert sampler.made == 3
    assert alone.files() == shared.files() and len(alone.files()) == 9


def test_a_manifest_line_says_what_was_made(workplace: Any) -> None:
    workplace.fill()
    manifest = read_manifest(workplace)
    line = manifest.shards[3]
    assert (line.count, line.points, line.evaluations, line.worker) == (6, 18, 42, 0)
    assert line.teacher_id == workplace.card.teacher_id and line.bytes == len(workplace.files()[line.name])
    assert line.sampler["steps"] == 4 and line.sampler["sampler_batch"] == line.micro_batch == 4
    assert manifest.evaluations == 9 * 42


def test_a_torn_last_line_is_not_read_and_swallows_nothing(workplace: Any) -> None:
    workplace.fill(2)
    path = workplace.run.replay(2) / "manifest.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    manifest = read_manifest(workplace)
    assert manifest.shards.keys() == {0}
    assert workplace.fill(1) == 1  # made again, its line stands alone
    assert manifest.refresh() and manifest.shards.keys() == {0, 1}


def test_a_shard_taken_back_is_made_again_identically(workplace: Any) -> None:
    workplace.fill(3)
    before, path = workplace.files(), workplace.run.replay(2) / shard_name(1)
    manifest = read_manifest(workplace)
    first = manifest.shards[1].id
    path.write_bytes(b"something else")
    manifest.redo(1, first, "corrupt")
    assert manifest.refresh() is False and manifest.shards.keys() == {0, 2} and manifest.redone == 1
    manifest.redo(1, first, "late")  # who had read the old line changes nothing
    assert workplace.fill(1) == 1
    manifest.redo(1, first, "later still")
    assert manifest.refresh() and manifest.shards.keys() == {0, 1, 2} and manifest.redone == 1
    assert workplace.files() == before
    assert manifest.evaluations == 4 * 42  # the work was done twice


def reseal(workplace: Any, **changes: Any) -> None:
    """Write the manifest's only line anew, as a program that means it would."""
    path = workplace.run.replay(2) / "manifest.jsonl"
    content = unseal(path.read_bytes().rstrip())
    assert content is not None
    path.write_bytes(seal(content | changes) + b"\n")


def test_a_manifest_of_another_schema_is_refused(workplace: Any) -> None:
    workplace.fill(1)
    reseal(workplace, schema=9)
    with pytest.raises(UserError, match=r"manifest\.jsonl: schema 9"):
        read_manifest(workplace)


def forged(workplace: Any, change: Callable[[str, bytes], tuple[str, bytes] | None]) -> bytes:
    """A shard with valid tar structure and changed members."""
    source = workplace.files()[shard_name(0)]
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(source)) as old, tarfile.open(fileobj=out, mode="w") as new:
        for member in old:
            changed = change(member.name, old.extractfile(member).read())  # type: ignore[union-attr]
            if changed is not None:
                info = tarfile.TarInfo(changed[0])
                info.size = len(changed[1])
                new.addfile(info, io.BytesIO(changed[1]))
    return out.getvalue()


def pickled_npy(name: str, data: bytes) -> tuple[str, bytes]:
    if not name.startswith("000000000001.end"):
        return name, data
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], dtype=object), allow_pickle=True)
    return name, buffer.getvalue()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (pickled_npy, "not an fp16 array"),
        (lambda name, data: (name, data[:-2]) if "targets" in name else (name, data), "not an fp16 array"),
        (lambda name, data: None if name == "000000000002.json" else (name, data), "000000000002.json expected"),
        (lambda name, data: (name.replace("000000000003", "../../x"), data), "000000000003.json expected"),
        (lambda name, data: (name, data.replace(b'"label":', b'"label":1.5,"x":')), "malformed"),
        (lambda name, data: (name, data.replace(b'"timesteps":[', b'"timesteps":[-')), "timestep"),
        (lambda name, data: (name, data.replace(b'"trajectory":1,', b'"trajectory":2,')), "another's"),
        (lambda name, data: (name, b"[" * 100000) if name.endswith("2.json") else (name, data), "trajectory 2"),
    ],
)
def test_a_forged_shard_is_corrupt(workplace: Any, change: Callable[..., Any], word: str) -> None:
    workplace.fill(1)
    assert decode(workplace.request, 0, forged(workplace, lambda name, data: (name, data))).label.shape == (6,)
    with pytest.raises(Corrupt, match=word):
        decode(workplace.request, 0, forged(workplace, change))


def test_the_pool_stays_below_its_limit_and_goes_on_when_shards_are_released(workplace: Any) -> None:
    limit = int(6.5 * workplace.request.shard_bytes)
    workplace.config.replay.pool_gb = limit / 1e9
    workplace.ask()
    sampler = workplace.sampler()
    request, made = sampler.current_request(), []
    for released in (0, 0, 2, 3, 7):
        write_json(workplace.run.replay_progress(2), {"released": released, "kept": [0, 0]})
        while (shard := sampler.next_shard(request)) is not None:
            sampler.make_shard(request, shard)
            made.append(shard)
            assert sum(map(len, workplace.files().values())) <= limit
        assert made[-1] == min(8, released + 5)
    assert made == list(range(9))
    assert set(workplace.files()) == {shard_name(shard) for shard in range(3, 9)}
    write_json(workplace.run.replay_progress(2), {"released": 1, "kept": [0, 0]})  # an older checkpoint was taken
    assert workplace.fill() == 2
    assert set(workplace.files()) == {shard_name(shard) for shard in range(1, 7)}


def test_shards_kept_for_reuse_are_not_retired(workplace: Any) -> None:
    workplace.config.replay.pool_gb = 6.5 * workplace.request.shard_bytes / 1e9
    workplace.ask()
    workplace.fill(3)
    write_json(workplace.run.replay_progress(2), {"released": 5, "kept": [1, 3]})
    workplace.fill()
    assert set(workplace.files()) == {shard_name(shard) for shard in (1, 2, 5, 6, 7, 8)}


def test_a_full_disk_pauses_the_sampler_and_leaves_no_half_shard(
    workplace: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sampler, refusals, seen = workplace.sampler(), [errno.ENOSPC, errno.EDQUOT, errno.ENOSPC], []
    publish = sidecar.publish

    def full(*args: Any, **kwargs: Any) -> Any:
        if refusals:
            seen.append((set(workplace.files()), read_json(workplace.run.sampler(0)).get("status")))
            raise OSError(refusals.pop(), "No space left on device")
        return publish(*args, **kwargs)

    monkeypatch.setattr(sidecar, "publish", full)
    monkeypatch.setattr(sampler.stop, "wait", lambda seconds: False)
    sampler.make_shard(sampler.current_request(), 0)
    assert seen[2] == (set(), "disk full") and sampler.made == 1
    assert capfd.readouterr().err.count("waits for room") == 1
    assert count_events(workplace.run)["disk_full"] == 1
    assert list(workplace.files()) == [shard_name(0)] and load(workplace, 0).label.shape == (6,)


def test_a_line_that_does_not_fit_is_an_error_and_the_next_one_stands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    path = tmp_path / "manifest.jsonl"
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:7]))
    with pytest.raises(OSError, match="No space"):
        append_line(path, seal({"event": "retired", "shard": 1}))
    monkeypatch.undo()
    append_line(path, seal({"event": "retired", "shard": 2}))
    assert [json.loads(line)["shard"] for line in path.read_text().split("\n")[1:] if line] == [2]


def test_what_a_crash_left_is_tidied(workplace: Any) -> None:
    workplace.fill(3)
    directory, before = workplace.run.replay(2), workplace.files()
    (directory / ".replay-000003.tar.77.tmp").write_bytes(b"half")
    (directory / shard_name(4)).write_bytes(b"renamed, but without its line")
    (directory / shard_name(0)).unlink()  # deleted, but without its line
    assert workplace.fill(1) == 1
    assert workplace.files() == before and not list(directory.glob(".*.tmp"))


def test_a_second_sampler_of_the_same_number_is_refused(workplace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "LOCK_SECONDS", 0.3)
    paths, stop = [workplace.run.sampler_lock(worker) for worker in range(2)], Told()
    wait = [refuse(path, worker, stop) for worker, path in enumerate(paths)]
    with worker_lock(paths[0], wait[0]) as first, worker_lock(paths[1], wait[1]) as second:
        assert first and second
        with pytest.raises(UserError, match=rf"{paths[0]}: another sampler .*--worker 0"):
            worker_lock(paths[0], wait[0]).__enter__()
    with worker_lock(paths[0], wait[0]) as held:
        assert held


def test_a_teacher_that_samples_nonsense_is_refused(workplace: Any) -> None:
    sampler = workplace.sampler()
    model, _ = sampler._open_teacher(sampler.current_request())
    model.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        sampler.make_shard(workplace.request, 0)
    assert not workplace.files()


def test_a_swapped_teacher_is_refused(workplace: Any) -> None:
    from safetensors.torch import load_file, save_file

    path = workplace.run.teacher(1) / "model.safetensors"
    save_file({name: tensor + torch.ones(1) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=str(path)):
        workplace.fill(1)


def test_a_discarded_pool_is_not_made_again(workplace: Any) -> None:
    workplace.fill(4)
    discard(workplace.run, 2)
    assert not workplace.files() and workplace.fill() == 0
    manifest = read_manifest(workplace)
    assert manifest.evaluations == 4 * 42 and not manifest.shards
