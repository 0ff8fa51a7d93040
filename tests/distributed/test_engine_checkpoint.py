"""Checkpoints: bit-exact where stage and world size stay, the same values where they change, whole or not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed import toy
from tests.distributed.conftest import Pools
from tests.distributed.pool import CaseFailed

Place = tuple[int, int]  # ZeRO stage, ranks
CONTINUED = [("fp32", 0), *((precision, stage) for precision in ("fp32", "bf16", "fp16") for stage in (1, 2, 3))]
PLACES: list[Place] = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2)]
MOVES: list[tuple[Place, Place]] = [(a, b) for a in PLACES for b in PLACES if a != b]
FAST_MOVES: list[tuple[Place, Place]] = [
    ((1, 1), (1, 2)),
    ((1, 2), (3, 2)),
    ((3, 2), (1, 2)),
    ((3, 2), (3, 1)),
    ((0, 2), (2, 1)),
    ((2, 2), (0, 1)),
]
SETTINGS: dict[str, Any] = {"clip_norm": 0.5, "decay": 0.7}


@pytest.mark.parametrize(("precision", "stage"), CONTINUED)
def test_going_on_is_bit_exact(pools: Pools, tmp_path: Path, precision: str, stage: int) -> None:
    """Six steps at once equal three, a checkpoint, a new engine, and three more.

    In fp16 the first loss scales are too large, so the checkpoint holds another scale and two skipped steps.
    """
    settings = {**SETTINGS, "stage": stage, "precision": precision}
    unbroken = pools[2].run("train", steps=6, **settings)[0]
    directory = str(tmp_path / "checkpoint")
    saved = pools[2].run("save", directory=directory, steps=3, **settings)[0]
    resumed = pools[2].run("resume", directory=directory, begin=3, end=6, **settings)[0]
    assert resumed["extra"] == {"seen_images": 3 * toy.GLOBAL_BATCH}
    assert resumed["loaded"] == saved["weights"]
    assert saved["skips"] == ([2, 0] if precision == "fp16" else [0, 0])
    assert resumed["skips"] == unbroken["skips"]
    assert resumed["losses"] == unbroken["losses"][3:]
    assert resumed["weights"] == unbroken["weights"]
    assert resumed["ema"] == unbroken["ema"]


def check_move(pools: Pools, tmp_path: Path, here: Place, there: Place) -> None:
    """What one place wrote, another loads to the bit, goes on from, and writes again unchanged."""
    (stage, ranks), (new_stage, new_ranks) = here, there
    first, second = tmp_path / "first", tmp_path / "second"
    pools[ranks].run("save", directory=str(first), steps=3, stage=stage, **SETTINGS)
    resumed = pools[new_ranks].run("resume", directory=str(first), begin=3, end=5, stage=new_stage, **SETTINGS)[0]
    written = {name: weight.flatten().tolist() for name, weight in load_file(first / "weights.safetensors").items()}
    assert resumed["loaded"] == written
    model = toy.make_model(2)
    model.load_state_dict(load_file(first / "weights.safetensors"))
    x, t, label, _ = toy.batch(0)
    assert resumed["output"] == pytest.approx(model(x[:2], t[:2], label[:2]).flatten().tolist(), abs=1e-6)
    unbroken = pools[ranks].run("train", steps=5, stage=stage, **SETTINGS)[0]
    assert resumed["losses"] == pytest.approx(unbroken["losses"][3:], abs=1e-6)
    pools[new_ranks].run("resave", source=str(first), target=str(second), stage=new_stage, **SETTINGS)
    for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        old, new = (load_file(directory / f"{name}.safetensors") for directory in (first, second))
        assert old.keys() == new.keys()
        assert all(torch.equal(old[key], new[key]) for key in old), name
    assert json.loads((first / "state.json").read_text()) == json.loads((second / "state.json").read_text())


@pytest.mark.parametrize(("here", "there"), FAST_MOVES)
def test_moving_to_another_stage_or_world_size(pools: Pools, tmp_path: Path, here: Place, there: Place) -> None:
    check_move(pools, tmp_path, here, there)


@pytest.mark.slow
@pytest.mark.parametrize(("here", "there"), [move for move in MOVES if move not in FAST_MOVES])
def test_every_other_move(pools: Pools, tmp_path: Path, here: Place, there: Place) -> None:
    check_move(pools, tmp_path, here, there)


def test_a_checkpoint_replaces_an_older_one(pools: Pools, tmp_path: Path) -> None:
    """And leaves nothing else behind."""
    directory = tmp_path / "checkpoint"
    pools[2].run("save", directory=str(directory), steps=1)
    old = load_file(directory / "weights.safetensors")
    pools[2].run("save", directory=str(directory), steps=2)
    new = load_file(directory / "weights.safetensors")
    assert not torch.equal(old["out.weight"], new["out.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_checkpoints_are_refused_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    """The main rank looks at every byte and names the file."""
    directory = tmp_path / "checkpoint"
    pools[2].run("save", directory=str(directory), steps=1)
    path = directory / "exp_avg.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    messages = pools[2].run("refused", directory=str(directory))
    assert "exp_avg.safetensors: damaged checkpoint" in messages[0]
    assert "another rank" in messages[1]
    path.write_bytes(content[:-8])
    for message in pools[2].run("refused", directory=str(directory)):
        assert "exp_avg.safetensors: " in message
    for message in pools[2].run("refused", directory=str(tmp_path / "nothing")):
        assert "nothing/state.json: unreadable checkpoint" in message


def test_training_goes_on_while_a_checkpoint_is_written(pools: Pools, tmp_path: Path) -> None:
    """What is written is the state at the time of the save, in weights and in `extra`; saves keep their order."""
    expected, places = tmp_path / "expected", [tmp_path / name for name in ("first", "second")]
    pools[2].run("save", directory=str(expected), steps=2, **SETTINGS)
    main, other = pools[2].run("save_and_go_on", directories=[str(place) for place in places], steps=2, **SETTINGS)
    assert main["early"] == []
    assert main["published"] == [str(place) for place in places]
    assert other["published"] == []
    assert main["threads"] == other["threads"] == 0
    for name in ("weights", "exp_avg", "exp_avg_sq", "ema"):
        old, new = (load_file(place / f"{name}.safetensors") for place in (expected, places[0]))
        assert all(torch.equal(old[key], new[key]) for key in old), name
        later = load_file(places[1] / f"{name}.safetensors")
        assert not any(torch.equal(old[key], later[key]) for key in old if key != "scale"), name
    assert [json.loads((place / "state.json").read_text())["extra"] for place in places] == [{"steps": [2]}] * 2


def test_a_checkpoint_that_cannot_be_written_fails_on_every_rank(pools: Pools, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for message in pools[2].run("unwritable", directory=str(tmp_path / "file" / "checkpoint")):
        assert "checkpoint" in message
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_failing_rank_is_seen(pools: Pools, tmp_path: Path) -> None:
    """`refused` itself fails when nothing is refused."""
    directory = tmp_path / "checkpoint"
    pools[1].run("save", directory=str(directory), steps=1)
    with pytest.raises(CaseFailed, match="nothing was refused"):
        pools[1].run("refused", directory=str(directory))
