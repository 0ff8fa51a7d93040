"""scikit-learn's handwritten digits as task shards, written with the shard schema alone; and a classifier of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.images import encode_image
from trainer.data.shards import (
    DatasetCard,
    Sample,
    SplitIndex,
    task_directory,
    write_card,
    write_index,
    write_shard,
)
from trainer.evaluation.classifier import Classifier, classifier_settings, load_or_train

TASKS = [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Digits:
    root: Path
    open_split: Callable[[str], TaskData]


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Digits:
    root = tmp_path_factory.mktemp("digits")
    pixels, targets = load_digits(return_X_y=True)
    images = np.rint(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)[..., None]  # (N, H, W, C)
    for task, classes in enumerate(TASKS, 1):
        own = np.flatnonzero(np.isin(targets, classes))
        for split, rows in (("train", own[own % 5 > 0]), ("test", own[own % 5 == 0])):
            samples, labels = [], [int(targets[row]) for row in rows]
            for row, label in zip(rows, labels, strict=True):
                extension, data = encode_image(images[row], "png")
                samples.append(Sample(f"{row:05d}", {extension: data, "cls": str(label).encode()}))
            directory = task_directory(root, split, task)
            entry = write_shard(directory / "00000.tar", samples, labels)
            write_index(directory, SplitIndex("digits", split, task, 8, 1, "png", classes, [entry]))
    write_card(root, DatasetCard("digits", 8, 1, "png", [str(i) for i in range(10)], TASKS))
    return Digits(root, lambda split: TaskData.open(root, split, [1, 2], Verify.size))


@pytest.fixture(scope="session")
def classifier(digits: Digits) -> Classifier:
    settings = classifier_settings(digits.root, TASKS, epochs=10, seed=0, flip=False, device=CPU)
    return load_or_train(digits.root / "evaluator", settings, digits.open_split, CPU)
