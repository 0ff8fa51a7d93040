"""The shard schema: bytes, index checks, image members."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.data.images import decode_image, encode_image, image_extension
from trainer.data.shards import Sample, check_shard, encode_shard, read_card, read_index, task_directory, write_shard
from trainer.errors import UserError

SAMPLES = [Sample("a-1", {"png": b"x" * 700, "cls": b"3"}), Sample("b_2", {"png": b"", "cls": b"4"})]


def test_offsets_are_those_of_tarfile() -> None:
    entry, data = encode_shard("s.tar", SAMPLES, [3, 4])
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        found = {member.name: [member.offset_data, member.size] for member in tar}
    spans = zip(entry.keys, entry.offsets, strict=True)
    assert found == {f"{key}.{extension}": span for key, members in spans for extension, span in members.items()}


def test_same_samples_same_bytes(tmp_path: Path) -> None:
    first, second = write_shard(tmp_path / "s.tar", SAMPLES), write_shard(tmp_path / "other" / "s.tar", SAMPLES)
    assert first == second
    assert (tmp_path / "s.tar").read_bytes() == (tmp_path / "other" / "s.tar").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "s.tar"]  # no temporary file is left


@pytest.mark.parametrize("key", ["a.b", "../../x", "a/b", ""])
def test_keys_that_webdataset_misreads_are_refused(key: str) -> None:
    with pytest.raises(UserError, match="sample key"):
        encode_shard("s.tar", [Sample(key, {"cls": b"0"})])


def test_check_shard_names_the_damage(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    entry = write_shard(path, SAMPLES)
    check_shard(path, entry, sha256=True)
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    check_shard(path, entry, sha256=False)
    with pytest.raises(UserError, match=r"s\.tar: corrupt"):
        check_shard(path, entry, sha256=True)
    path.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"s\.tar: .* bytes, .* expected"):
        check_shard(path, entry, sha256=False)
    path.unlink()
    with pytest.raises(UserError, match=r"s\.tar: missing"):
        check_shard(path, entry, sha256=False)


def _first_shard(index: dict[str, Any]) -> dict[str, Any]:
    return index["shards"][0]


@pytest.mark.parametrize(
    "damage",
    [
        lambda index: index.pop("shards"),
        lambda index: index.update(schema=99),
        lambda index: index.update(classes=3),
        lambda index: index.update(names=3),
        lambda index: index.update(task="1"),
        lambda index: index.update(surprise=1),
        lambda index: _first_shard(index).update(name="../../etc/passwd"),
        lambda index: _first_shard(index).update(count=1),
        lambda index: _first_shard(index).update(labels=[0]),
        lambda index: _first_shard(index).update(labels=7),
        lambda index: _first_shard(index)["offsets"][0].update(png=[0, 10**9]),
        lambda index: _first_shard(index)["offsets"][0].update(png=[-5, 3]),
        lambda index: _first_shard(index)["offsets"][0].update(png="x"),
        lambda index: _first_shard(index).update(keys=[1] * 7),
    ],
)
def test_malformed_index_is_refused_by_name(make_dataset: Any, damage: Any) -> None:
    directory = task_directory(make_dataset().root, "train", 1)
    content = json.loads((directory / "index.json").read_text())
    damage(content)
    (directory / "index.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"train/task-01/index\.json: "):
        read_index(directory)


@pytest.mark.parametrize("text", ["{", "[]", '{"name": 1}', "\x00"])
def test_malformed_card_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json: "):
        read_card(tmp_path)


@pytest.mark.parametrize("field", ["tasks", "classes", "image_size", "schema"])
def test_card_fields_of_wrong_type_are_refused(make_dataset: Any, field: str) -> None:
    path = make_dataset().root / "dataset.json"
    content = json.loads(path.read_text())
    for value in (3.5, ["x", 1], {"a": 1}):
        path.write_text(json.dumps({**content, field: value}))
        with pytest.raises(UserError, match=r"dataset\.json: "):
            read_card(path.parent)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["png", "raw"])
def test_image_members_round_trip(format: str, channels: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (5, 5, channels), dtype=np.uint8)
    extension, data = encode_image(image, format)
    assert np.array_equal(decode_image(data, extension, 5, channels), image.transpose(2, 0, 1))
    if format == "raw":  # any program that reads .npy reads it
        assert np.array_equal(np.load(io.BytesIO(data), allow_pickle=False), image.transpose(2, 0, 1))


def _png(size: tuple[int, int], mode: str) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


_NOISE = encode_image(np.random.default_rng(0).integers(0, 256, (4, 4, 1), dtype=np.uint8), "png")[1]


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "extension", "message"),
    [
        (_png((4, 5), "L"), "png", "4x5 L, 4x4 L expected"),
        (_png((4, 4), "RGB"), "png", "4x4 RGB, 4x4 L expected"),
        (_NOISE[: len(_NOISE) // 2], "png", "not a readable png"),
        (_png((4, 4), "L"), "jpg", "not a readable jpg"),
        (b"", "webp", "not a readable webp"),
        (_npy(np.zeros((1, 4, 4), np.float32)), "npy", "not a .npy file of uint8"),
        (_npy(np.zeros((1, 4, 5), np.uint8)), "npy", "not a .npy file of uint8"),
        (_npy(np.zeros((1, 4, 4), np.uint8))[:-1], "npy", "too few or too many"),
        (_npy(np.array([{"a": 1}], dtype=object)), "npy", "not a .npy file of uint8"),
    ],
)
def test_members_that_are_not_the_image_promised(data: bytes, extension: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decode_image(data, extension, 4, 1)


def test_a_decompression_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    data = _png((3000, 3000), "L")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the pixels were decoded"))
    with pytest.raises(UserError, match="3000x3000"):
        decode_image(data, "png", 4, 1)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="not a readable png"):
        decode_image(data, "png", 4, 1)


def test_a_sample_has_exactly_one_image() -> None:
    assert image_extension({"cls": [0, 1], "jpg": [0, 1]}) == "jpg"
    assert image_extension({"cls": [0, 1]}) is None
    assert image_extension({"png": [0, 1], "npy": [0, 1]}) is None
