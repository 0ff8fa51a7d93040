"""The benchmark of reading: it runs, its rows are whole, and it notices what is read wrongly."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from claims import WrongResult
from reader import PEER, check_images, check_points, main
from reading.shards import PointsByHand, smooth_images, write_images, write_replay

from trainer.config import Points

SMALL: dict[str, Any] = {"trajectories": 4, "shards": 2, "batch": 8, "seed": 3}


def test_everything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quick", "--json", str(tmp_path / "reader.json")]) in (0, 1)  # what holds depends on the machine
    content = json.loads((tmp_path / "reader.json").read_text())
    rows = content["rows"]
    assert [row["claim"].partition(",")[0].partition(" and")[0] for row in rows] == [
        *("replay points",) * 4,
        *("raw", "png", "png", "png", "jpeg", "jpeg", "raw", "raw", "raw", "raw"),
    ]
    for row in rows:
        assert row["holds"] is (
            row["ratio"] >= row["bar"] if row["bound"] == "at least" else row["ratio"] <= row["bar"]
        )
        assert row["ours"] > 0 and row["spread"]["ours"]
        assert (row["peer"] or 0) > 0 if row["against"] else row["peer"] is None
    assert {row["against"] for row in rows} == {"", PEER}
    assert {row["bar"] for row in rows if row["unit"] == "images/s/core" and not row["against"]} == {20_000}
    assert "reader.py --quick" in content["command"] and set(content["versions"]) >= {"torch", "webdataset", "pillow"}
    assert "raw, 12x12x3: a core reads" in capsys.readouterr().out


def test_images_in_wrong_places_are_noticed(tmp_path: Path) -> None:
    shards = write_images(tmp_path, smooth_images(20, 8, 0), "raw")
    check_images(shards, 6)
    wrong = replace(shards.data, spans=shards.data.spans[::-1].copy())
    with pytest.raises(WrongResult, match="raw: pixels differ"):
        check_images(replace(shards, data=wrong), 6)


@pytest.mark.parametrize("points", list(Points))
def test_points_of_other_positions_are_noticed(tmp_path: Path, points: Points, monkeypatch: pytest.MonkeyPatch) -> None:
    replay = write_replay(tmp_path / "replay", points, 8, **SMALL)
    check_points(replay)
    agree = PointsByHand.agree
    monkeypatch.setattr(PointsByHand, "agree", lambda self, positions, stored: agree(self, positions + 1, stored))
    assert np.array_equal(replay.positions(1), np.arange(8, 16))
    with pytest.raises(WrongResult, match=f"{points.value}: points differ"):
        check_points(replace(replay, offers=replay.offers[:1]))
