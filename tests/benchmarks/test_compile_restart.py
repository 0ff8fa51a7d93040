"""What benchmarks/compile_restart.py makes of its measurements; the compiler has a test of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import compile_restart
import pytest


def fake_starts(monkeypatch: pytest.MonkeyPatch, warm: dict[str, Any]) -> None:
    """Cold starts of 20, 30 and 40 s, each followed by a warm one of 4 s that differs as `warm` says."""
    cold = {"gradients": "a", "missed": 2, "hardware": "card", "versions": {}}
    results = [
        result
        for seconds in (20.0, 30.0, 40.0)
        for result in (cold | {"seconds": seconds}, cold | {"seconds": 4.0, "missed": 0} | warm)
    ]
    monkeypatch.setattr(compile_restart, "launch", lambda cache, quick: results.pop(0))


@pytest.mark.parametrize(("seconds", "code", "ratio"), [(4.0, 0, 7.5), (8.0, 1, 3.75)])
def test_a_row_of_medians(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: float, code: int, ratio: float
) -> None:
    fake_starts(monkeypatch, {"seconds": seconds})
    assert compile_restart.main(["--json", str(tmp_path / "result.json")]) == code
    (row,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert (row["ours"], row["peer"], row["ratio"], row["holds"]) == (seconds, 30.0, ratio, code == 0)
    assert row["spread"] == {"ours": [seconds, seconds], "peer": [25.0, 35.0]}


@pytest.mark.parametrize("warm", [{"gradients": "b"}, {"missed": 1}])
def test_wrong_starts_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, warm: dict[str, Any]) -> None:
    fake_starts(monkeypatch, warm)
    assert compile_restart.main(["--json", str(tmp_path / "result.json")]) == compile_restart.WRONG
    assert not (tmp_path / "result.json").exists()
