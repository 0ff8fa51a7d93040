"""The training loop on two ranks: skipped steps, their limit, a stop that one rank wants."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.conftest import Pools

SETTINGS = [
    "model.channels=[8,8]",
    "model.norm_groups=4",
    "train.images_per_task=192",  # 12 steps
    "train.global_batch=16",
    "train.log_every=2",
    "checkpoint.every_images=32",
    "ema.decay=0.9",
]


def learn(
    pools: Pools, root: Path, name: str, *settings: str, poisoned: list[int] | None = None, **options: Any
) -> Any:
    """What each of two ranks says of a run."""
    arguments = {"root": str(root), "name": name, "settings": [*SETTINGS, *settings], "poisoned": poisoned or []}
    return pools[2].run("learn", **arguments, **options)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_few_skipped_steps_are_counted_and_the_run_goes_on(pools: Pools, tmp_path: Path, stage: int) -> None:
    main, other = learn(pools, tmp_path, "run", f"zero.stage={stage}", poisoned=[4, 5, 9])
    assert main["account"]["cost"]["skipped_steps"] == 3
    assert main["teacher"] == other["teacher"]
    assert main["checkpoints"] == [12, 10]


def test_too_many_in_a_row_end_the_run_with_the_checkpoints_from_before(pools: Pools, tmp_path: Path) -> None:
    whole = learn(pools, tmp_path, "whole")
    main, other = learn(pools, tmp_path, "run", "train.max_skipped=4", poisoned=list(range(5, 12)))
    assert main["error"] == "UserError"
    assert "no finite number for 5 steps in a row" in main["message"]
    assert "train.max_skipped" in main["message"]
    assert other["error"] == "ToldElsewhere"
    assert main["checkpoints"] == [8, 6, 4, 2]  # checkpoint.keep is 2; the last two were amid the trouble
    for step in (8, 6):
        shutil.rmtree(tmp_path / "run" / "tasks" / "1" / "checkpoints" / f"step-{step:08d}")
    resumed = learn(pools, tmp_path, "run", "train.max_skipped=4")
    assert [rank["teacher"] for rank in resumed] == [rank["teacher"] for rank in whole]
    assert resumed[0]["account"]["cost"]["skipped_steps"] == 0


def test_a_stop_that_one_rank_wants_is_everybodys(pools: Pools, tmp_path: Path) -> None:
    whole = learn(pools, tmp_path, "whole")
    stopped = learn(pools, tmp_path, "run", stop_at=7)
    assert [rank["error"] for rank in stopped] == ["Stopped", "Stopped"]
    assert stopped[0]["message"] == stopped[1]["message"]
    step = stopped[0]["checkpoints"][0]
    assert 7 <= step < 12
    assert stopped[0]["message"].startswith(f"stopped and saved in task 1 after {step * 16} images; the same command")
    resumed = learn(pools, tmp_path, "run")
    assert [rank["teacher"] for rank in resumed] == [rank["teacher"] for rank in whole]
    assert computed(resumed) == pytest.approx(computed(whole)), "with the steps between the last log and the stop"


def computed(ranks: list[dict[str, Any]]) -> float:
    """What the model has computed over all attempts, in TFLOP, as the main rank counts it."""
    cost = ranks[0]["account"]["cost"]
    return cost["model_tflops"] * cost["train_seconds"]


@pytest.mark.parametrize("classifier", ["joint", "separate"])
def test_a_model_that_classifies_learns_the_same_under_every_stage(
    pools: Pools, tmp_path: Path, classifier: str
) -> None:
    settings = [
        *("method.name=finetune", "model.conditional=false", f"model.classifier={classifier}"),
        *("model.classifier_dropout=0", "jdcl.classification_weight=0.1", "ema.decay=0"),
        # Adam would make whole steps of the rounding in gradients near zero.
        *("data.labelled=0.5", "jdcl.fixmatch_threshold=0.15", "optimizer.eps=1e-3"),
    ]
    stages = {"plain": ["zero.stage=0"], "sharded": ["zero.stage=3"], "cut": ["zero.stage=2", "train.micro_batch=2"]}
    weights: dict[str, dict[str, Tensor]] = {}
    for name, own in stages.items():
        ranks = learn(pools, tmp_path, name, *settings, *own)
        assert ranks[0]["teacher"] == ranks[1]["teacher"]
        weights[name] = load_file(tmp_path / name / "tasks" / "1" / "teacher" / "model.safetensors")
    for name in ("sharded", "cut"):
        for key, expected in weights["plain"].items():
            torch.testing.assert_close(weights[name][key], expected, rtol=0, atol=1e-5, msg=f"{name}: {key}")
