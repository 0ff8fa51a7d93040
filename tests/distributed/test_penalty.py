"""Penalties under every ZeRO stage, against a plain torch loop whose loss has the penalty as a term of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.distributed import toy
from tests.distributed.conftest import Pools

STEPS, TASKS, CLIP = 6, 3, 0.8
KINDS = ["l2", "ewc", "rank1_ewc"]


def equation(kind: str, model: nn.Module, tasks: int) -> Tensor:
    """The penalty on the model's weights, for autograd."""
    value = torch.zeros(())
    weights = dict(model.named_parameters())
    for task in range(tasks):
        anchors, fisher, scale = toy.memory(task)
        moved = {name: weight - anchors[name] for name, weight in weights.items()}
        if kind == "rank1_ewc":
            value = value + scale * torch.stack([(fisher[name] * moved[name]).sum() for name in moved]).sum().square()
        elif kind == "ewc":
            value = value + torch.stack([(fisher[name] * moved[name].square()).sum() for name in moved]).sum()
        elif task == tasks - 1:
            value = torch.stack([part.square().sum() for part in moved.values()]).sum()
    return toy.PENALTY_WEIGHT / 2 * value


class Reference:
    """One process, the whole batch, autograd through loss and penalty together."""

    def __init__(self, kind: str, begin: int = 0) -> None:
        """From step `begin` on, as if those before had been skipped."""
        model = toy.make_model()
        adam = torch.optim.Adam(model.parameters(), lr=1e-2, foreach=False, fused=False)
        self.losses, self.norms, self.values = list[float](), list[float](), list[float]()
        for step in range(begin, STEPS):
            adam.param_groups[0]["lr"] = toy.learning_rate(step)
            x, t, label, target = toy.batch(step)
            loss, value = (model(x, t, label) - target).pow(2).mean(), equation(kind, model, TASKS)
            adam.zero_grad()
            (loss + value).backward()
            self.norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
            adam.step()
            self.losses.append(loss.item())
            self.values.append(value.item())
        self.weights = {name: weight.flatten() for name, weight in model.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "ranks"), [*((stage, 2) for stage in (0, 1, 2, 3)), (1, 1), (3, 1)])
def test_every_stage_adds_the_penalty_to_the_loss(pools: Pools, kind: str, stage: int, ranks: int) -> None:
    """Before clipping, and once: in two micro-batches as in one."""
    expected = Reference(kind)
    assert min(expected.norms) > CLIP, "the clipping must bite"
    settings = {"stage": stage, "clip_norm": CLIP, "micro_batch": 2 if stage == 2 else 0}
    for found in pools[ranks].run("held", kind=kind, tasks=TASKS, steps=STEPS, **settings):
        assert found["losses"] == pytest.approx(expected.losses, rel=1e-6)
        assert found["values"] == pytest.approx(expected.values, rel=1e-6)
        assert found["norms"] == pytest.approx(expected.norms, rel=1e-5)
        for name, values in found["weights"].items():
            torch.testing.assert_close(torch.tensor(values), expected.weights[name], atol=2e-6, rtol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (3, "bf16"), (2, "fp16")])
def test_half_precision_holds_the_fp32_weights(pools: Pools, kind: str, stage: int, precision: str) -> None:
    """As without a penalty near fp32; the loss scale of fp16 is not the penalty's business."""
    settings = {"stage": stage, "precision": precision, "clip_norm": CLIP}
    found = pools[2].run("held", kind=kind, tasks=TASKS, steps=STEPS, **settings)[0]
    skipped = found["skips"][0]  # while fp16 finds its loss scale
    assert skipped < STEPS - 2
    expected = Reference(kind, begin=skipped)
    assert found["values"][skipped:] == pytest.approx(expected.values, rel=2e-2)
    assert found["norms"][skipped:] == pytest.approx(expected.norms, rel=2e-2)


SETTINGS = [
    *("data.tasks=[[0,1],[2,3]]", "model.channels=[8,8]", "model.norm_groups=4", "train.images_per_task=128"),
    *("train.global_batch=16", "checkpoint.every_images=32", "ema.decay=0.9", "optimizer.lr=3e-3"),
    *("replay.placement=inline", "replay.steps=2"),
]
TWO_TASKS = 16  # steps of both
FISHER = ["method.fisher_images=9", "method.fisher_draws=2"]


def learn(pools: Pools, root: Path, name: str, *settings: str, **options: Any) -> dict[str, Any]:
    """What the main rank of two says of a run of two tasks."""
    arguments = {"root": str(root), "name": name, "settings": [*SETTINGS, *settings], "poisoned": []}
    return pools[2].run("learn", **arguments, **options)[0]


def weights(root: Path, name: str, task: int = 2) -> dict[str, Tensor]:
    return load_file(root / name / "tasks" / str(task) / "teacher" / "model.safetensors")


@pytest.mark.parametrize(
    ("method", "stage"),
    [
        (("method.name=finetune", "method.penalty=ewc", *FISHER), 1),
        (("method.name=generative_distillation", "method.penalty=rank1_ewc", *FISHER), 3),
    ],
    ids=["ewc", "distillation-rank1_ewc"],
)
def test_a_run_stopped_in_the_middle_of_a_task_ends_with_the_same_weights(
    pools: Pools, tmp_path: Path, method: tuple[str, ...], stage: int
) -> None:
    method = (*method, "method.penalty_weight=1000", f"zero.stage={stage}")
    whole = learn(pools, tmp_path, "whole", *method)
    stopped = learn(pools, tmp_path, "run", *method, stop_at=12)
    assert stopped["error"] == "Stopped" and TWO_TASKS // 2 < stopped["checkpoints"][0] + 8 < TWO_TASKS
    file = tmp_path / "run" / "tasks" / "1" / "fisher" / "fisher.safetensors"
    written = file.stat().st_mtime_ns
    assert file.read_bytes() == (tmp_path / "whole" / file.relative_to(tmp_path / "run")).read_bytes()
    assert learn(pools, tmp_path, "run", *method)["teacher"] == whole["teacher"]
    assert file.stat().st_mtime_ns == written, "measured once"
    assert not (tmp_path / "run" / "tasks" / "2" / "fisher").exists(), "nothing comes after the last task"


@pytest.mark.parametrize("kind", KINDS)
def test_stages_measure_and_hold_the_same(pools: Pools, tmp_path: Path, kind: str) -> None:
    """The whole way from a task's gradients to the next task's weights, with ZeRO-0 and with ZeRO-3."""
    fisher = [] if kind == "l2" else FISHER
    for stage in (0, 3):
        method = (f"method.name={kind}", "method.penalty_weight=100", *fisher)
        assert "teacher" in learn(pools, tmp_path, f"{stage}", *method, f"zero.stage={stage}")
    first, second = weights(tmp_path, "0"), weights(tmp_path, "3")
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_a_strong_hold_keeps_the_weights_where_they_were(pools: Pools, tmp_path: Path) -> None:
    moved = dict[str, float]()
    for weight in (0, 1000):
        learn(pools, tmp_path, f"{weight}", "method.name=l2", f"method.penalty_weight={weight}")
        before, after = weights(tmp_path, f"{weight}", 1), weights(tmp_path, f"{weight}")
        moved[f"{weight}"] = sum((after[name] - before[name]).square().sum().item() for name in before)
    assert moved["1000"] < 0.2 * moved["0"]


def test_a_stop_while_a_task_is_measured_loses_nothing(pools: Pools, tmp_path: Path) -> None:
    """At the end of task 1, before the first step of task 2."""
    method = ("method.name=ewc", *FISHER)
    stopped = learn(pools, tmp_path, "run", *method, stop_at=8)
    assert stopped["error"] == "Stopped" and "between two tasks" in stopped["message"]
    assert not (tmp_path / "run" / "tasks" / "1" / "fisher").exists()
    whole = learn(pools, tmp_path, "whole", *method)
    assert learn(pools, tmp_path, "run", *method)["teacher"] == whole["teacher"]


def test_what_another_teacher_left_is_refused(pools: Pools, tmp_path: Path) -> None:
    method = ("method.name=ewc", *FISHER)
    learn(pools, tmp_path, "run", *method, stop_at=12)
    card = tmp_path / "run" / "tasks" / "1" / "fisher" / "card.json"
    card.write_text(json.dumps(json.loads(card.read_text()) | {"teacher_id": "another"}))
    refused = learn(pools, tmp_path, "run", *method)
    assert refused["error"] == "UserError" and "of another teacher or penalty; delete" in refused["message"]
    shutil.rmtree(card.parent)
    assert "teacher" in learn(pools, tmp_path, "run", *method)
