"""Hidden labels: a share of each class, the same images whatever is read beside them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from tests.data.conftest import TASKS, Maker
from trainer.config import Verify
from trainer.data.dataset import TaskData
from trainer.data.labelled import hide_labels


@pytest.fixture
def data(make_dataset: Maker) -> TaskData:
    return TaskData.open(make_dataset(count=60).root, "train", [1, 2], Verify.size)


def known(data: TaskData) -> set[str]:
    return {key for key, label in zip(data.sample_keys, data.labels.tolist(), strict=True) if label >= 0}


@pytest.mark.parametrize(("share", "count"), [(0.5, 15), (0.1, 3), (0.05, 2), (0.01, 1), (0.99, 30)])
def test_a_share_of_each_class_keeps_its_labels(data: TaskData, share: float, count: int) -> None:
    """Of 30 images: 0.05 are 1.5, which rounds to 2; one at least."""
    hidden = hide_labels(data, share, seed=0)
    assert np.isin(hidden.labels, [-1, *range(4)]).all()
    for label in range(4):
        assert int((hidden.labels == label).sum()) == count
    kept = hidden.labels >= 0
    assert (hidden.labels[kept] == data.labels[kept]).all()


def test_nothing_but_labels_changes(data: TaskData) -> None:
    before = data.labels.copy()
    hidden = hide_labels(data, 0.3, seed=0)
    assert replace(hidden, labels=before).labels is before and (data.labels == before).all()
    assert hidden.keys is data.keys and hidden.sample_keys is data.sample_keys and hidden.classes == data.classes
    assert (hidden.read(np.arange(5)) == data.read(np.arange(5))).all()
    assert hide_labels(data, 1.0, seed=0) is data


def test_chosen_by_the_seed(data: TaskData) -> None:
    first, again, other = (known(hide_labels(data, 0.3, seed)) for seed in (0, 0, 1))
    assert first == again != other
    more = known(hide_labels(data, 0.6, seed=0))
    assert first < more  # who raises the share keeps what was known


def test_the_same_images_whatever_the_tasks(make_dataset: Maker, data: TaskData) -> None:
    root = make_dataset(count=60).root
    joint = hide_labels(data, 0.2, seed=4)
    for task, classes in enumerate(TASKS, 1):
        alone = hide_labels(TaskData.open(root, "train", [task], Verify.size), 0.2, seed=4)
        rows = np.isin(data.labels, classes)
        assert alone.labels.tolist() == joint.labels[rows].tolist()
    order = np.random.default_rng(0).permutation(len(data))
    assert (hide_labels(data.subset(order), 0.2, seed=4).labels == joint.labels[order]).all()
    elsewhere = replace(data, keys=data.keys + np.uint64(1))  # as they are with the classes in another task
    assert (hide_labels(elsewhere, 0.2, seed=4).labels == joint.labels).all()


def test_every_image_is_as_likely_as_another(data: TaskData) -> None:
    counts = np.zeros(len(data))
    for seed in range(300):
        counts += hide_labels(data, 0.2, seed).labels >= 0
    assert abs(counts.mean() - 60) < 1e-9 and (np.abs(counts - 60) < 5 * (300 * 0.2 * 0.8) ** 0.5).all()
