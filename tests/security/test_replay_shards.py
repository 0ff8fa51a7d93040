"""Hostile replay shards: corrupt, quickly, with nothing unpickled or extracted."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.fuzz.conftest import Workplace, workplace
from tests.security.hostile import (
    TEN_GB,
    Trap,
    huge_npy,
    pickled,
    pickled_npy,
    refused,
    tar_header,
    tar_of,
)
from trainer.replay.decode import Corrupt, decode

__all__ = ["workplace"]
FIRST = "000000000000"
Members = list[tuple[str, bytes]]


def members(data: bytes) -> Members:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        files: list[tuple[str, Any]] = [(info.name, tar.extractfile(info)) for info in tar]
        return [(name, file.read()) for name, file in files]


def put(name: str, content: Callable[[Trap], bytes]) -> Callable[[Members, Trap], Members]:
    """Replace the content of one member."""
    return lambda found, trap: [(key, content(trap) if key == name else data) for key, data in found]


def rename(name: str, other: str) -> Callable[[Members, Trap], Members]:
    return lambda found, trap: [(other if key == name else key, data) for key, data in found]


@pytest.mark.parametrize(
    "change",
    [
        put(f"{FIRST}.end.npy", pickled_npy),
        put(f"{FIRST}.end.npy", pickled),
        put(f"{FIRST}.targets.npy", lambda trap: huge_npy("<f2", (1, 4, 4))),
        put(f"{FIRST}.json", pickled),
        put(f"{FIRST}.json", lambda trap: b"[" * 10**6),
        put(f"{FIRST}.json", lambda trap: b'{"a":' * 10**6),
        *(lambda found, trap, name=name: [*found, (name, pickled(trap))] for name in ("x.pkl", "x.pyd", "x.pth")),
        *(lambda found, trap, name=name: [(name, pickled(trap)), *found] for name in ("x.pkl", "x.pyd", "x.pth")),
        *(rename(f"{FIRST}.json", name) for name in ("../x", "/etc/passwd", f"../{FIRST}.json", f"./{FIRST}.json")),
    ],
)
def test_members_made_to_hurt(workplace: Workplace, trap: Trap, change: Callable[[Members, Trap], Members]) -> None:
    whole = members(workplace.encoded(0))
    assert decode(workplace.request, 0, tar_of(whole)).label.shape == (4,)
    data = tar_of(change(whole, trap))
    refused(lambda: decode(workplace.request, 0, data), Corrupt, "")


@pytest.mark.parametrize(
    "headers",
    [
        [tar_header(f"{FIRST}.json", TEN_GB)],
        [tar_header(f"{FIRST}.json", -512)] * 4,
        [tar_header("x", TEN_GB, b"L")],
        [tar_header("x", 0, b"L")] * 5000,
        [tar_header("x", 0, b"x")] * 5000,
        [tar_header(f"{FIRST}.json", 0, b"2", "../../etc/passwd")],
        [tar_header(f"{FIRST}.json", 0, b"1", "/etc/passwd")],
        [tar_header(f"{FIRST}.json", 0, b"6")],
        [tar_header(f"{FIRST}.json", 0, b"3")],
        [tar_header(f"{FIRST}.json", 0, b"5")],
    ],
)
def test_hostile_headers(workplace: Workplace, headers: list[bytes]) -> None:
    data = b"".join(headers) + workplace.encoded(0)
    refused(lambda: decode(workplace.request, 0, data), Corrupt, "")


def test_a_request_for_huge_arrays_allocates_nothing_before_it_has_read_them(workplace: Workplace) -> None:
    request = replace(workplace.request, image_size=10**5)
    refused(lambda: decode(request, 0, workplace.encoded(0)), Corrupt, "not an fp16 array")
