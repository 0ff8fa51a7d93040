"""The teacher on disk: what is read is what was written, and what is damaged is named."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from trainer.config import DiffusionConfig, ModelConfig, Prediction, Schedule
from trainer.diffusion.schedules import make_schedule
from trainer.errors import UserError
from trainer.models.denoiser import Denoiser, build_denoiser
from trainer.models.teacher import TeacherCard, load_teacher, read_card, save_teacher

MODEL = ModelConfig(channels=[8, 16], norm_groups=4, attention_levels=[1], dropout=0.2)
DIFFUSION = DiffusionConfig(timesteps=100, schedule=Schedule.cosine, prediction=Prediction.v)


def _denoiser(seed: int = 0) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_denoiser(MODEL, image_size=8, channels=1, max_classes=4)


def _save(directory: Path, seed: int = 0, task: int = 2) -> TeacherCard:
    return save_teacher(
        directory,
        _denoiser(seed).state_dict(),
        task=task,
        classes=[3, 1],
        model=MODEL,
        diffusion=DIFFUSION,
        image_size=8,
        channels=1,
        max_classes=4,
        class_names=["a", "b", "c", "d"],
    )


def test_round_trip(tmp_path: Path) -> None:
    card = _save(tmp_path)
    state = torch.random.get_rng_state()
    model, schedule, found = load_teacher(tmp_path, "cpu")
    assert torch.equal(torch.random.get_rng_state(), state), "loading must not draw from the global generator"
    assert found == card == read_card(tmp_path)
    assert card.teacher_id == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert card.model_config == MODEL and card.diffusion_config == DIFFUSION
    assert asdict(card) == json.loads((tmp_path / "card.json").read_text())
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0, 50, 99]), torch.tensor([0, 1, 3])
    assert torch.equal(model(x, t, label), _denoiser().eval()(x, t, label))
    assert torch.equal(schedule.signal, make_schedule(DIFFUSION).signal) and schedule.prediction is Prediction.v


def test_half_precision(tmp_path: Path) -> None:
    _save(tmp_path)
    model, schedule, _ = load_teacher(tmp_path, "cpu", torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert schedule.signal.dtype == torch.float32


def test_same_weights_same_id_and_bytes(tmp_path: Path) -> None:
    first, again, other = _save(tmp_path / "a"), _save(tmp_path / "b"), _save(tmp_path / "c", seed=1)
    assert first == again and first.teacher_id != other.teacher_id
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_replacing_a_teacher(tmp_path: Path) -> None:
    first = _save(tmp_path)
    second = _save(tmp_path, seed=1, task=3)
    assert load_teacher(tmp_path, "cpu")[2] == second != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["card.json", "model.safetensors"]


def test_one_flipped_bit_is_refused(tmp_path: Path) -> None:
    _save(tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: sha256"):
        load_teacher(tmp_path, "cpu")


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"card\.json: missing"):
        read_card(tmp_path)
    _save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: unreadable"):
        load_teacher(tmp_path, "cpu")


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"teacher_id": "x"}',
        "a model key",
        "a schedule",
        "no schedule",
    ],
)
def test_bad_cards_are_named(tmp_path: Path, content: bytes | str) -> None:
    card = asdict(_save(tmp_path))
    if content == "a model key":
        card["model"]["depth"] = 3
    elif content == "a schedule":
        card["diffusion"]["schedule"] = "quadratic"
    elif content == "no schedule":
        del card["diffusion"]["schedule"]
    data = json.dumps(card).encode() if isinstance(content, str) else content
    (tmp_path / "card.json").write_bytes(data)
    with pytest.raises(UserError, match=r"card\.json"):
        read_card(tmp_path)


def test_a_card_from_before_there_was_a_key_is_read(tmp_path: Path) -> None:
    card = _save(tmp_path)
    old = asdict(card)
    del old["model"]["label_dropout"]
    (tmp_path / "card.json").write_text(json.dumps(old))
    assert read_card(tmp_path) == card


def test_card_of_another_model_is_refused(tmp_path: Path) -> None:
    card = _save(tmp_path)
    wide = asdict(replace(MODEL, channels=[16, 16]))
    (tmp_path / "card.json").write_text(json.dumps({**asdict(card), "model": wide}))
    with pytest.raises(UserError, match=r"model\.safetensors: not the weights"):
        load_teacher(tmp_path, "cpu")
