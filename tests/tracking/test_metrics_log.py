"""metrics.jsonl over kills and restarts."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from collections.abc import Callable
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


def full_after(room: int, code: int) -> Callable[[int, bytes], int]:
    """An `os.write` of a disk that takes `room` more bytes."""
    write, left = os.write, [room]

    def limited(descriptor: int, data: bytes) -> int:
        if data and not left[0]:
            raise OSError(code, os.strerror(code))
        written = write(descriptor, data[: left[0]])
        left[0] -= written
        return written

    return limited


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("room", [0, 7])
def test_on_a_full_disk_whole_lines_are_lost_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int, room: int
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("train", {"seen": 1})
        with monkeypatch.context() as full:
            full.setattr(os, "write", full_after(room, code))
            log.append("train", {"seen": 2})
            assert path.read_bytes().count(b"\n") == 1 and path.read_bytes().endswith(b"\n")
            log.append("train", {"seen": 3})
        log.append("train", {"seen": 4})
    assert [json.loads(line)["seen"] for line in path.read_text().splitlines()] == [1, 4]
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and str(path) in warning and os.strerror(code) in warning


def test_half_a_line_that_cannot_be_taken_back_is_removed_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append("train", {"seen": 1})
        with monkeypatch.context() as full:
            full.setattr(os, "write", full_after(7, errno.ENOSPC))
            full.setattr(os, "ftruncate", refuse)
            log.append("train", {"seen": 2})
            log.append("train", {"seen": 3})
        assert path.read_bytes().split(b"\n")[1] != b""  # the half line still stands there, alone
        log.append("train", {"seen": 4})
    assert [json.loads(line)["seen"] for line in path.read_text().splitlines()] == [1, 4]


class FullStream(io.StringIO):
    """A standard error that goes to a file on the full disk."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_warning_that_cannot_be_printed_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        with monkeypatch.context() as full:
            full.setattr(os, "write", full_after(0, errno.ENOSPC))
            full.setattr(sys, "stderr", FullStream())
            log.append("train", {"seen": 1})
        log.append("train", {"seen": 2})
    assert [line["seen"] for line in read_log(tmp_path / "metrics.jsonl")] == [2]


def test_other_errors_of_the_disk_are_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl") as log, monkeypatch.context() as broken:
        broken.setattr(os, "write", full_after(0, errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            log.append("train", {"seen": 1})
