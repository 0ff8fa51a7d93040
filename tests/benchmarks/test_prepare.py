"""The benchmark of preparing ImageNet-100: it runs, and notices shards that are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import prepare
import pytest
from claims import WRONG

pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install 'palimpsest[parquet]')")


def test_everything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "prepare.json"
    assert prepare.main(["--quick", "--workers", "1", "--json", str(path), "--work", str(tmp_path)]) == 0
    content = json.loads(path.read_text())
    assert list(content["shape"]) == ["folder", "imagenet", "parquet"] and len(content["rate"]) == 4
    for result in (*content["shape"].values(), *content["rate"].values()):
        assert result["build"]["images_per_cpu_second"] > 0 and result["verify"]["cpu_ms_per_image"] > 0
    assert content["shape"]["folder"]["images"] == 10 * (6 + 2)
    assert (
        content["shape"]["imagenet"]["same_shards_as"] == "folder"
        and "windows of a random field" in content["synthetic"]
    )
    assert "prepare.py --quick" in content["command"] and "500x375 to 64, png" in capsys.readouterr().out
    assert [entry.name for entry in tmp_path.iterdir()] == ["prepare.json"]


def test_other_pixels_are_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_pillow: Any = prepare.by_pillow
    monkeypatch.setattr(prepare, "by_pillow", lambda data, size: by_pillow(data, size) ^ 1)
    with pytest.raises(SystemExit) as ended:
        prepare.main(["--quick", "--workers", "1", "--parts", "shape", "--forms", "folder", "--work", str(tmp_path)])
    assert ended.value.code == WRONG and "is not what Pillow makes of it" in capsys.readouterr().err
