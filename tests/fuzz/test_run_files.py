"""The small files through which the processes of a run talk: refused by name, or something safe instead."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from tests.fuzz.conftest import CLASSES, Workplace
from tests.fuzz.mutate import amount, byte_mutants, settled, tree_mutants
from trainer.checkpoint import CheckpointReader, write_checkpoint
from trainer.models.teacher import CARD_NAME, load_teacher, read_card
from trainer.replay.request import read_request
from trainer.replay.state import read_json, read_state, write_json, write_state
from trainer.replay.window import Limits, read_progress


def mutants_of(path: Path, count: int) -> Iterator[bytes]:
    """Changed bytes, and changed structure."""
    original = path.read_bytes()
    yield from byte_mutants(original, count // 2, seed=0)
    for tree in tree_mutants(json.loads(original), count // 2, seed=1):
        yield json.dumps(tree).encode()
    yield b"[" * 100_000
    yield b'{"a":' * 100_000


@amount(1500)
def test_requests(workplace: Workplace, count: int) -> None:
    path, accepted = workplace.run.replay_request(2), 0
    for data in mutants_of(path, count):
        path.write_bytes(data)
        request = settled(lambda: read_request(path), str(path))
        if request is not None:
            accepted += 1
            assert request.shard_bytes > 0 and request.capacity >= 0 and request.shard_of(0) == 0
            assert request.evaluations_per_trajectory > 0 and json.loads(json.dumps(asdict(request))) == asdict(request)
            assert all(type(label) is int for label in request.classes)
    assert 0.02 < accepted / count < 0.95


@amount(600)
def test_teacher_cards(workplace: Workplace, count: int) -> None:
    directory, accepted = workplace.run.teacher(1), 0
    path = directory / CARD_NAME
    for data in mutants_of(path, count):
        path.write_bytes(data)
        card = settled(lambda: read_card(directory), str(path))
        loaded = settled(lambda: load_teacher(directory, "cpu"), str(directory))
        assert loaded is None or card is not None
        if loaded is not None:
            accepted += 1
            model, schedule, _ = loaded
            out = model(torch.zeros(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64), torch.tensor([CLASSES[0]]))
            assert out.shape == (1, 1, 4, 4) and schedule.timesteps > 1
    assert 0.01 < accepted / count < 0.95


@amount(600)
def test_checkpoints(tmp_path: Path, count: int) -> None:
    directory = tmp_path / "step-00000001"
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.zeros(4)}
    write_checkpoint(directory, {"weights": dict(tensors)}, {"step": 1, "extra": {"task": 1}})
    shapes = {name: tensor.shape for name, tensor in tensors.items()}

    def read() -> dict[str, torch.Tensor]:
        reader, found = CheckpointReader(directory), {}
        reader.verify()
        reader.check("weights", shapes)
        reader.read("weights", lambda get: found.update({name: get(name) for name in shapes}))
        return found

    for name in ("state.json", "weights.safetensors"):
        path = directory / name
        original = path.read_bytes()
        mutants = mutants_of(path, count) if name == "state.json" else byte_mutants(original, count, seed=2)
        for data in mutants:
            path.write_bytes(data)
            found = settled(read, str(directory))
            assert found is None or all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        path.write_bytes(original)


@amount(1200)
def test_progress(workplace: Workplace, count: int) -> None:
    """Whatever the trainer's progress says, if anything: only shards of this pool are made, and few enough."""
    path, limits = workplace.run.replay_progress(2), Limits.of(workplace.request)
    write_json(path, {"released": 3, "kept": [1, 3], "used": 4})
    read = 0
    for data in mutants_of(path, count):
        path.write_bytes(data)
        progress = read_progress(path)
        if progress is not None:
            read += 1
            assert progress.released >= 0 and 0 <= progress.kept.start <= progress.kept.stop
            assert 0 <= len(limits.room(progress)) <= limits.total
            surplus = limits.surplus(5, range(20), progress)
            assert set(surplus) <= set(range(20)) and not any(shard in progress.kept for shard in surplus)
    assert 0.02 < read / count < 0.9


@pytest.mark.parametrize(
    "text",
    [
        *("[]", '{"released": "x"}', '{"released": 1e400}', '{"released": -5}', '{"released": null}', '{"kept": 3}'),
        *('{"kept": [1]}', '{"kept": [5, 1]}', '{"kept": [0, 1e9]}', '{"kept": {"a": 1, "b": 2}}'),
        '{"released": 3, "kept": [-9, -1], "used": 3}',
        '{"released": -3, "kept": [0, 0], "used": 3}',
        '{"released": 3, "kept": [0, 1267650600228229401496703205376], "used": 3}',
    ],
)
def test_progress_that_makes_no_sense_is_none(workplace: Workplace, text: str) -> None:
    """Nothing is retired on the word of a file that cannot be believed."""
    path = workplace.run.replay_progress(2)
    path.write_text(text)
    assert read_progress(path) is None


@amount(1200)
def test_states_and_heartbeats(workplace: Workplace, count: int) -> None:
    write_state(workplace.run, 2)
    path = workplace.run.state
    for data in mutants_of(path, count):
        path.write_bytes(data)
        state = read_state(workplace.run)
        if state is not None:
            assert type(state.task) is int and type(state.finished) is bool and math.isfinite(state.time)
            assert state.task >= 1
        assert isinstance(read_json(path), dict)
