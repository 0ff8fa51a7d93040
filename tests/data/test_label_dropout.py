"""Dropped labels: a share of them, drawn from run seed, sample key and draw alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trainer.config import Config, DiffusionConfig
from trainer.data.batch import Examples
from trainer.data.label_dropout import LabelDropout
from trainer.data.prepare import Preparer
from trainer.data.stream import HostBatch
from trainer.diffusion.schedules import make_schedule

NULL = 10
DROPOUT = LabelDropout(0.2, NULL, seed=3)


def _keys(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.uint64) * np.uint64(977)


def test_a_share_of_the_labels_whatever_they_are() -> None:
    label = torch.arange(50_000) % NULL
    found = DROPOUT(label, "current/label-dropout", _keys(len(label)))
    dropped = found == NULL
    assert torch.equal(found[~dropped], label[~dropped])
    assert abs(float(dropped.float().mean()) - 0.2) < 4 * (0.2 * 0.8 / len(label)) ** 0.5
    per_class = torch.bincount(label[dropped], minlength=NULL).float() / 5000
    assert float((per_class - 0.2).abs().max()) < 5 * (0.2 * 0.8 / 5000) ** 0.5


def test_drawn_from_key_draw_purpose_and_seed_not_from_the_batch() -> None:
    label, keys = torch.zeros(400, dtype=torch.int64), _keys(400)
    whole = DROPOUT(label, "current/label-dropout", keys, 1)
    parts = [
        DROPOUT(label[:100], "current/label-dropout", keys[start : start + 100], 1) for start in range(0, 400, 100)
    ]
    assert torch.equal(torch.cat(parts), whole)
    others = [
        DROPOUT(label, "current/label-dropout", keys, 2),
        DROPOUT(label, "buffer/2/label-dropout", keys, 1),
        LabelDropout(0.2, NULL, seed=4)(label, "current/label-dropout", keys, 1),
    ]
    assert not any(torch.equal(other, whole) for other in others)


def test_replay_points_go_by_their_position() -> None:
    """Ranks that share a step out drop what one rank alone would; nothing but the label changes."""
    x = torch.zeros(64, 1, 2, 2)
    points = Examples(x, torch.arange(64), x, torch.arange(64) % NULL)
    whole = DROPOUT.of_positions(points, 2, 640)
    halves = [
        DROPOUT.of_positions(Examples(x[rows], points.t[rows], x[rows], points.label[rows]), 2, 640 + rows.start)
        for rows in (slice(0, 32), slice(32, 64))
    ]
    assert torch.equal(torch.cat([half.label for half in halves]), whole.label)
    assert 0 < int((whole.label == NULL).sum()) < 32
    assert whole.x is points.x and whole.t is points.t and whole.target is points.target
    assert not torch.equal(DROPOUT.of_positions(points, 2, 704).label, whole.label)
    assert not torch.equal(DROPOUT.of_positions(points, 3, 640).label, whole.label)


def test_a_config_that_drops_none_has_no_null_label() -> None:
    config = Config()
    assert config.null_label is None and LabelDropout.of(config) is None
    config.model.label_dropout, config.model.max_classes = 0.1, 12
    assert config.null_label == 12 and LabelDropout.of(config) == LabelDropout(0.1, 12, config.run.seed)
    config.model.conditional = False
    assert config.null_label is None


@pytest.mark.parametrize("purpose", ["current", "buffer/2"])
def test_real_images_lose_their_label_and_nothing_else(purpose: str) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (200, 1, 4, 4), dtype=np.uint8))
    batch = HostBatch(images, torch.arange(200) % NULL, _keys(200), np.full(200, 5, dtype=np.uint64))
    prepare = [
        Preparer(
            make_schedule(DiffusionConfig()),
            seed=1,
            purpose=purpose,
            flip=True,
            device=torch.device("cpu"),
            dtype=torch.float32,
            label_dropout=dropout,
        )
        for dropout in (None, DROPOUT)
    ]
    plain, dropped = (call(batch) for call in prepare)
    assert torch.equal(plain.label, batch.labels) and torch.equal(plain.x, dropped.x)
    assert torch.equal(plain.t, dropped.t) and torch.equal(plain.target, dropped.target)
    expected = DROPOUT(batch.labels, f"{purpose}/label-dropout", batch.keys, batch.draws)
    assert torch.equal(dropped.label, expected) and 10 < int((dropped.label == NULL).sum()) < 80
