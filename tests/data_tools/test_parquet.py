"""Parquet files as Hugging Face's data sets have them."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from imagenet_files import LISTED, WNIDS, make_tree, parquet_rows, write_parquet
from PIL import Image

from data_tools import spool
from data_tools.sources import open_source
from data_tools.sources.base import Place
from data_tools.sources.parquet import read_rows
from trainer.errors import UserError

pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'palimpsest[parquet]')")

TREE = make_tree(train=5, val=2)
HUMAN = ["tench", "goldfish", "terrier", "crane"]


def shuffled(split: str, seed: int = 0) -> list[tuple[str, int, bytes]]:
    rows = parquet_rows(TREE, split)
    return [rows[row] for row in np.random.default_rng(seed).permutation(len(rows))]


def write(root: Path, form: str = "data/{split}-{number:05d}-of-00002.parquet", names: Any = HUMAN) -> Path:
    for split, rows in (("train", shuffled("train")), ("validation", shuffled("val"))):
        half = len(rows) // 2
        for number, part in enumerate((rows[:half], rows[half:])):
            write_parquet(root / form.format(split=split, number=number), part, names, group=3)
    return root


def pictures(source: Any, split: str, label: int) -> list[bytes]:
    return sorted(source.load(split, id).tobytes() for id, _ in source.samples(split, {label}))


def expected(split: str, wnid: str) -> list[bytes]:
    images = TREE["train" if split == "train" else "val"][wnid].values()
    return sorted(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).tobytes() for data in images)


@pytest.mark.parametrize(
    "form", ["data/{split}-{number}.parquet", "{split}-{number}.parquet", "{split}/{number}.parquet"]
)
def test_layouts(tmp_path: Path, form: str) -> None:
    source = open_source("parquet", str(write(tmp_path, form)), "x", None)
    assert source.class_names == HUMAN
    for split in ("train", "test"):
        for label, wnid in enumerate(WNIDS):
            assert pictures(source, split, label) == expected(split, wnid)


def test_a_class_list_of_wnids_finds_them_in_the_paths(tmp_path: Path) -> None:
    source = open_source("parquet", str(write(tmp_path)), "x", LISTED)
    for wnid in LISTED:
        assert pictures(source, "train", source.class_names.index(wnid)) == expected("train", wnid)
    labels = [label for _, label in source.samples("train", {0, 1, 2, 3})]
    assert labels == [3] * 5 + [1] * 5 + [2] * 5 + [0] * 5  # in the order of the list, what is not listed last
    longer = open_source("parquet", str(tmp_path), "x", [*LISTED, WNIDS[0]])
    assert list(longer.samples("train", {1, 3})) == list(source.samples("train", {1, 3}))


def test_a_file_of_names_wins(tmp_path: Path) -> None:
    (write(tmp_path) / "labels.txt").write_text("\n".join(WNIDS) + "\n")
    assert open_source("parquet", str(tmp_path), "x", LISTED).class_names == WNIDS
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"labels\.txt: 2 names, but there is a label 3"):
        open_source("parquet", str(tmp_path), "x", None)


def test_names_that_occur_twice_are_refused_unless_something_else_names_them(tmp_path: Path) -> None:
    write(tmp_path, names=["crane", "goldfish", "terrier", "crane"])
    with pytest.raises(UserError, match=r"two classes are called 'crane': name them all in labels\.txt"):
        open_source("parquet", str(tmp_path), "x", None)
    assert open_source("parquet", str(tmp_path), "x", LISTED).class_names == WNIDS


def test_one_set_is_split_once_and_for_all(tmp_path: Path) -> None:
    rows = [(path, label, data) for path, label, data in shuffled("train") for _ in range(4)]
    write_parquet(tmp_path / "part-0.parquet", rows)
    source = open_source("parquet", str(tmp_path), "x", None)
    counts = [np.bincount([label for _, label in source.samples(split, range(4))]) for split in ("train", "test")]
    assert [count.tolist() for count in counts] == [[18] * 4, [2] * 4] and source.class_names == list("0123")
    assert open_source("parquet", str(tmp_path / "part-0.parquet"), "x", WNIDS).class_names == WNIDS


def test_each_row_group_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "UNIT", 2)
    source: Any = open_source("parquet", str(write(tmp_path)), "x", LISTED)
    ids = [id for id, _ in source.samples("train", {1, 2, 3})]
    places = {f"train-{id:06d}": source.place("train", id) for id in ids}
    seen: list[tuple[str, int]] = []
    for unit in spool.units(places):
        groups = dict.fromkeys((place.file, place.group) for _, place in unit)
        seen += groups
        for file in dict.fromkeys(place.file for _, place in unit):
            part = [place for _, place in unit if place.file == file]
            assert [place for place, _ in read_rows(part)] == part  # in the order of the file
    assert len(seen) == len(set(seen)) and seen == sorted(seen)


def test_damage_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path)
    path = tmp_path / "data" / "train-00000-of-00002.parquet"
    whole = path.read_bytes()
    for data in (b"", b"no parquet", whole[:-20], whole[:4] + bytes(40) + whole[-8:]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: damaged") as error:
            open_source("parquet", str(tmp_path), "x", None)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[:200] + bytes(600) + whole[800:])  # within images
    source: Any = open_source("parquet", str(tmp_path), "x", None)
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet: "):
        for id, _ in source.samples("train", range(4)):
            source.load("train", id)
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), path)
    with pytest.raises(UserError, match=r"column image\.bytes missing"):
        open_source("parquet", str(tmp_path), "x", None)
    write_parquet(path, [("a", -1, b"x")])
    with pytest.raises(UserError, match="holds other things than labels"):
        open_source("parquet", str(tmp_path), "x", None)
    write_parquet(path, [("a.JPEG", 0, None)])
    source = open_source("parquet", str(path), "x", None)
    with pytest.raises(UserError, match="row 0 of row group 0: broken image"):
        source.load("train", 0)
    with pytest.raises(UserError, match="holds no parquet files"):
        (tmp_path / "empty").mkdir()
        open_source("parquet", str(tmp_path / "empty"), "x", None)


def test_without_pyarrow_the_way_to_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'palimpsest\[parquet\]'"):
        open_source("parquet", str(tmp_path), "x", None)


def test_places_tell_row_groups_apart() -> None:
    assert Place("f", "n", start=1, group=0) != Place("f", "n", start=1, group=1)
