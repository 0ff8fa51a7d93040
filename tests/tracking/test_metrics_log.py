"""metrics.jsonl over kills and restarts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.tracking.log import MetricsLog, read_log


def test_lines_are_json_and_append_over_attempts(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    for attempt in range(2):
        with MetricsLog(path) as log:
            log.append("train", {"task": 1, "seen": 64 * attempt, "loss": 0.5})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["seen"] for line in lines] == [0, 64] and lines[0]["event"] == "train"
    assert lines[0]["time"] <= lines[1]["time"]
    assert list(read_log(path)) == lines


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_line_cut_by_a_kill_is_dropped_on_resume(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("train", {"seen": 1})
        log.append("train", {"seen": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    assert [line["seen"] for line in read_log(path)] in ([1], [1, 2])  # readable while cut, too
    with MetricsLog(path) as log:
        log.append("train", {"seen": 3})
    assert [json.loads(line)["seen"] for line in path.read_text().splitlines()] == [1, 3]


@pytest.mark.parametrize("size", [10, 5000])
def test_a_file_of_one_cut_line_starts_anew(tmp_path: Path, size: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"x": "' + b"a" * size)
    with MetricsLog(path) as log:
        log.append("train", {"seen": 1})
    assert [line["seen"] for line in read_log(path)] == [1]
    assert len(path.read_text().splitlines()) == 1


def test_values_that_are_not_json_numbers_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("train", {"loss": float("nan"), "grad": float("inf"), "lr": 1e-4})
    line = next(read_log(path))
    assert (line["loss"], line["grad"], line["lr"]) == (None, None, 1e-4)


def test_lines_that_are_no_objects_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'[1]\n\xff\xfe\n{"seen": 4}\n{"seen": ')
    assert [line["seen"] for line in read_log(path)] == [4]
