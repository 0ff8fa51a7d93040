"""Computing activations again is invisible in the weights, whatever ZeRO does with them meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import Pools

SETTINGS = [
    "model.channels=[8,16]",
    "model.norm_groups=4",
    "model.attention_levels=[1]",
    "model.dropout=0.2",
    "train.images_per_task=64",
    "train.global_batch=16",
    "train.micro_batch=4",
    "ema.decay=0.9",
]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")])
def test_the_same_weights_in_every_stage(pools: Pools, tmp_path: Path, stage: int, precision: str) -> None:
    """Two ranks, two micro-batches, dropout: bit for bit the weights of a run that keeps its activations."""
    teachers = set[str]()
    for again in ("false", "true"):
        settings = [*SETTINGS, f"zero.stage={stage}", f"train.precision={precision}"]
        settings.append(f"train.activation_checkpointing={again}")
        arguments = {"root": str(tmp_path), "name": again, "settings": settings, "poisoned": []}
        teachers |= {rank["teacher"] for rank in pools[2].run("learn", **arguments)}
    assert len(teachers) == 1
