"""What is asked of a model with a classifier whose answers are known."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from trainer.config import Config, Verify
from trainer.data.dataset import TaskData
from trainer.preflight import prepare_data
from trainer.probe import Probe
from trainer.run import RunDir
from trainer.settings import load_config
from trainer.world import World

TASKS = [[3, 0], [7, 1]]
SETTINGS = [
    "data.tasks=[[3,0],[7,1]]",
    *("model.conditional=false", "model.classifier=joint", "method.name=finetune", "evaluation.batch=50"),
]


class Opinionated:
    """Prefers class 9, then 7, then 3 where an image is bright, then 0, whatever else it is shown."""

    def __init__(self) -> None:
        self.head, self.seen = nn.Identity(), []

    def classify(self, view: Tensor) -> Tensor:
        self.seen.append(view)
        logits = torch.zeros(len(view), 10)
        logits[:, 9], logits[:, 7], logits[:, 0] = 3.0, 2.0, 0.5
        logits[:, 3] = (view.mean(dim=(1, 2, 3)) > -0.4).float()
        return logits


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = load_config("digits", [f"data.root={tmp_path_factory.mktemp('probed') / 'data'}", *SETTINGS])
    prepare_data(config, progress=False)
    return config


def test_a_model_tells_among_the_classes_learnt_on_all_test_images(config: Config, tmp_path: Path) -> None:
    probe = Probe(config, RunDir(tmp_path), World(0, 1, 0, torch.device("cpu")), nullcontext)
    model = Opinionated()
    first = probe._classified(model, 1)[0]  # pyright: ignore[reportArgumentType]
    data = [TaskData.open(Path(config.data.root), "test", [task], Verify.size) for task in (1, 2)]
    images = data[0].read(np.arange(len(data[0])))
    bright = images.astype(np.float64).mean(axis=(1, 2, 3)) / 127.5 - 1.0 > -0.4
    right = np.where(bright, 3, 0) == data[0].labels
    assert 0 < bright.sum() < len(bright) and first["model_accuracy"] == pytest.approx(right.mean())
    assert first["model_images"] == len(data[0]) and len(first["tasks"]) == 1
    shown = torch.cat(model.seen)
    torch.testing.assert_close(shown, torch.from_numpy(images).float() / 127.5 - 1.0)  # clean, and each of them once
    assert max(map(len, model.seen)) <= 50
    second = probe._classified(model, 2)[0]  # pyright: ignore[reportArgumentType]
    sevens = int((data[1].labels == 7).sum())
    assert second["tasks"][0] == {"task": 1, "model_accuracy": 0.0, "model_images": len(data[0])}
    assert second["tasks"][1]["model_accuracy"] == pytest.approx(sevens / len(data[1]))
    assert second["model_accuracy"] == pytest.approx(sevens / (len(data[0]) + len(data[1])))
    assert len(data[0]) < np.isin(load_digits().target, TASKS[0]).sum()


def test_a_model_without_a_classifier_is_not_asked(config: Config, tmp_path: Path) -> None:
    probe = Probe(config, RunDir(tmp_path), World(0, 1, 0, torch.device("cpu")), nullcontext)
    model = Opinionated()
    model.head = None  # pyright: ignore[reportAttributeAccessIssue]
    assert probe._classified(model, 1) == [] and model.seen == []  # pyright: ignore[reportArgumentType]
