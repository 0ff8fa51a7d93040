"""Teachers and checkpoints: safetensors and JSON alone, and hostile ones are refused in one line."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.fuzz.conftest import Workplace, workplace
from tests.security.hostile import NO_FILES, QUICK, TEN_GB, Trap, no_file, pickled, refused
from trainer.checkpoint import write_checkpoint
from trainer.data.shards import sha256_file
from trainer.errors import UserError
from trainer.models.teacher import CARD_NAME, WEIGHTS_NAME, load_teacher

__all__ = ["workplace"]
pytestmark = QUICK


def assert_safe(directory: Path) -> None:
    """Nothing but safetensors and JSON, which are what their names say."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.suffix in (".safetensors", ".json")
        assert load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_bytes())


def test_a_teacher_holds_no_pickle(workplace: Workplace) -> None:
    assert_safe(workplace.run.teacher(1))


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    pieces = {name: {"a": torch.zeros(3)} for name in ("weights", "exp_avg", "exp_avg_sq", "ema")}
    write_checkpoint(tmp_path / "step-00000001", pieces, {"step": 1})
    assert_safe(tmp_path)


def header(content: dict[str, Any], length: int | None = None) -> bytes:
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


TENSOR = {"dtype": "F32", "shape": [TEN_GB // 4], "data_offsets": [0, TEN_GB]}


@pytest.mark.parametrize(
    "data",
    [
        lambda trap: header({}, length=TEN_GB),
        lambda trap: header({"unet.conv_in.weight": TENSOR}),
        lambda trap: header({"a": TENSOR | {"shape": [2**62, 2**62]}}),
        lambda trap: struct.pack("<Q", 10**6) + b"[" * 10**6,
        lambda trap: struct.pack("<Q", 10**6) + b'{"a":' * 200_000,
        lambda trap: pickled(trap),
        lambda trap: b"",
    ],
)
def test_weights_made_to_hurt(workplace: Workplace, trap: Trap, data: Any) -> None:
    """Even where the card vouches for them."""
    directory = workplace.run.teacher(1)
    path = directory / WEIGHTS_NAME
    path.write_bytes(data(trap))
    refused(lambda: load_teacher(directory, "cpu"), UserError, str(path))
    card = json.loads((directory / CARD_NAME).read_bytes())
    (directory / CARD_NAME).write_text(json.dumps(card | {"teacher_id": sha256_file(path)}))
    refused(lambda: load_teacher(directory, "cpu"), UserError, str(path))


@NO_FILES
def test_weights_that_are_no_file(workplace: Workplace, kind: str) -> None:
    path = no_file(workplace.run.teacher(1) / WEIGHTS_NAME, kind)
    refused(lambda: load_teacher(path.parent, "cpu"), UserError, str(path))
