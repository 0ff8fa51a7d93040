"""jdcl on small real digits: it keeps what finetuning forgets, and tells what its teachers' images were like."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer.replay.manifest import publications

from .conftest import TINY
from .endurance import Run

STEPS, BATCH = 80, 32
CLASSIFYING = ("model.conditional=false", "model.classifier=joint", "jdcl.classification_weight=0.1")
SETTINGS: dict[str, Any] = TINY | {
    "model": {"channels": [16, 32], "norm_groups": 8},
    "optimizer": {"lr": 2e-3},
    "train": {"images_per_task": STEPS * BATCH, "global_batch": BATCH, "log_every": 20, "threads": 1},
    "ema": {"decay": 0.95},
    "replay": {
        "steps": 5,
        "points_per_trajectory": 20,
        "shard_trajectories": 32,
        "sampler_batch": 32,
        "placement": "external",
    },
    "jdcl": {"weak_crop": 1.0, "strong_operations": 0, "label_weight": 0.01, "logit_weight": 0.1},
    "evaluation": {"samples": 48, "steps": 5, "classifier_epochs": 1, "grid_per_class": 1, "loss_images": 0},
    "checkpoint": {"every_images": STEPS * BATCH},
    "tracking": {"progress": False},
}


def learn(path: Path, method: str) -> Run:
    run = Run(path / method, SETTINGS, steps=STEPS, sampler=method == "jdcl")
    try:
        run.start(1, f"method.name={method}", *CLASSIFYING)
        run.conclude()
    finally:
        run.place.close()
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, zygote: None) -> dict[str, Run]:
    path = tmp_path_factory.mktemp("jdcl")
    return {method: learn(path, method) for method in ("jdcl", "finetune")}


def test_it_keeps_what_finetuning_forgets(runs: dict[str, Run]) -> None:
    finals = {method: run.place.metrics("run")["final"] for method, run in runs.items()}
    assert finals["finetune"]["average_accuracy"] < 0.65, "the last task alone is still known"
    assert finals["jdcl"]["average_accuracy"] > finals["finetune"]["average_accuracy"] + 0.15
    assert finals["jdcl"]["backward_transfer"] > finals["finetune"]["backward_transfer"]


def test_what_was_sampled_in_vain_is_told(runs: dict[str, Run]) -> None:
    run = runs["jdcl"]
    lines = publications(run.directory.replay(2))
    told = run.place.metrics("run")["replay"]
    assert told["rejected_images"] == sum(line.rejected for line in lines) > 0
    lacking = sum(sum(line.lacking.values()) for line in lines)
    assert sum(told["lacking"].values()) == lacking
    assert told["events"]["missing_class"] == len({label for line in lines for label in line.lacking})
