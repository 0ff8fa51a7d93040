"""The Fisher information of a task: gradients of single samples, against a closed form, and its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.data.conftest import make_dataset as make_dataset
from trainer.config import DiffusionConfig, Verify
from trainer.data.dataset import TaskData
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.diffusion.schedules import make_schedule
from trainer.errors import UserError
from trainer.fisher import FISHER_NAME, SampleGradients, check_fisher, choose, read_fisher_card, save_fisher
from trainer.world import World

DRAWS = 3


class Linear(nn.Module):
    """e(x, t, label) = a x + b: the gradient of one sample's loss is known."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.4)), nn.Parameter(torch.tensor(-0.2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        return self.a * x + self.b


def preparer() -> Preparer:
    device = torch.device("cpu")
    schedule = make_schedule(DiffusionConfig())
    return Preparer(schedule, seed=0, purpose="fisher/1", flip=True, device=device, dtype=torch.float32)


def walk(data: TaskData, rank: int, size: int, pauses: list[int] | None = None) -> list[list[float]]:
    """Gradients (n, 2) of a rank's share."""
    model: Any = Linear()
    gradients = SampleGradients(model, data, DRAWS, preparer(), World(rank, size, rank, torch.device("cpu")))
    found = gradients.walk(lambda: None if pauses is None else pauses.append(rank))
    return [[part.item() for part in sample] for sample in found]


def closed_form(data: TaskData) -> list[list[float]]:
    """Of every image and draw: d/da = mean(2 r x), d/db = mean(2 r), r = a x + b - eps."""
    rows = list[list[float]]()
    for index in range(len(data)):
        for draw in range(DRAWS):
            one = np.array([index])
            images, labels = torch.from_numpy(data.read(one)), torch.from_numpy(data.labels[one])
            pair = preparer()(HostBatch(images, labels, data.keys[one], np.array([draw], dtype=np.uint64)))
            x, residual = pair.x.double(), 0.4 * pair.x.double() - 0.2 - pair.target.double()
            rows.append([(2 * residual * x).mean().item(), (2 * residual).mean().item()])
    return rows


def test_gradients_are_those_of_single_samples_at_timesteps_and_noises_of_their_own(make_dataset: Any) -> None:
    data = TaskData.open(make_dataset().root, "train", [1], Verify.size)
    expected = np.array(closed_form(data))
    np.testing.assert_allclose(walk(data, 0, 1), expected, rtol=1e-4, atol=1e-6)
    assert len(np.unique(expected[:, 0].round(6))) == len(expected), "no two samples are the same"


def test_ranks_share_the_samples_out(make_dataset: Any) -> None:
    data = TaskData.open(make_dataset().root, "train", [1], Verify.size)
    pauses = list[int]()
    parts = [walk(data, rank, 7, pauses) for rank in range(7)]
    assert sum(map(len, parts)) == len(data) * DRAWS
    assert sorted(row for part in parts for row in part) == sorted(walk(data, 0, 1))
    assert {pauses.count(rank) for rank in range(7)} == {pauses.count(0)}, "a pause is a collective"


def test_images_are_chosen_by_seed_and_key_alone(make_dataset: Any) -> None:
    data = TaskData.open(make_dataset().root, "train", [1], Verify.size)
    chosen = data.keys[choose(data, 7, 3, 1)]
    shuffled = data.subset(np.random.default_rng(0).permutation(len(data)))
    assert np.array_equal(shuffled.keys[choose(shuffled, 7, 3, 1)], chosen) and len(set(chosen.tolist())) == 7
    assert set(data.keys[choose(data, 7, 4, 1)].tolist()) != set(chosen.tolist())
    assert len(choose(data, 10**6, 3, 1)) == len(data)


SHAPES = {"a": (2, 3), "b": (4,)}


def saved(directory: Path) -> Path:
    tensors = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    save_fisher(directory, tensors, "ewc", "teacher", samples=12, scale=1.0)
    return directory


def test_files_are_read_back(tmp_path: Path) -> None:
    directory = saved(tmp_path / "fisher")
    check_fisher(directory, "ewc", "teacher", SHAPES)
    assert (read_fisher_card(directory).samples, read_fisher_card(directory).scale) == (12, 1.0)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    saved(directory)
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize(
    ("penalty", "teacher", "shapes", "message"),
    [
        ("rank1_ewc", "teacher", SHAPES, r"card\.json: of another teacher or penalty"),
        ("ewc", "other", SHAPES, r"card\.json: of another teacher or penalty"),
        ("ewc", "teacher", SHAPES | {"b": (5,)}, r"fisher\.safetensors: of another model"),
        ("ewc", "teacher", {"a": (2, 3)}, r"fisher\.safetensors: of another model"),
    ],
)
def test_what_does_not_belong_is_refused(
    tmp_path: Path, penalty: str, teacher: str, shapes: dict[str, tuple[int, ...]], message: str
) -> None:
    with pytest.raises(UserError, match=f"{message}; delete .*fisher, and it is measured again"):
        check_fisher(saved(tmp_path / "fisher"), penalty, teacher, shapes)


def test_damage_is_named(tmp_path: Path) -> None:
    directory = saved(tmp_path / "fisher")
    path = directory / FISHER_NAME
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"fisher\.safetensors: damaged"):
        check_fisher(directory, "ewc", "teacher", SHAPES)
    path.unlink()
    with pytest.raises(UserError, match=r"fisher\.safetensors: unreadable"):
        check_fisher(directory, "ewc", "teacher", SHAPES)


@pytest.mark.parametrize(
    "card", [b"", b"[]", b"{}", b"[" * 10**5, json.dumps({"penalty": 1}).encode(), b"\xff", b'{"scale": 1}']
)
def test_a_card_that_is_none_is_refused(tmp_path: Path, card: bytes) -> None:
    directory = saved(tmp_path / "fisher")
    (directory / "card.json").write_bytes(card)
    with pytest.raises(UserError, match=r"card\.json"):
        read_fisher_card(directory)
