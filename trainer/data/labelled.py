"""The share of a data set whose labels are known: the others' are hidden from what learns."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from trainer.data.dataset import TaskData
from trainer.seeds import hash_keys, smallest

UNKNOWN = -1


def hide_labels(data: TaskData, share: float, seed: int) -> TaskData:
    """The same images, of which `share` of each class, rounded, but one at least, keep their labels; UNKNOWN elsewhere.

    The samples with the smallest derived seeds keep them: which ones depends on the run's seed and on the images of
    their class alone, not on the task that they are in (so not on `data.keys`) or what is read beside them.
    """
    if share == 1.0:
        return data
    keys = hash_keys(data.sample_keys)
    labels = np.full_like(data.labels, UNKNOWN)
    for label in np.unique(data.labels):
        rows = np.flatnonzero(data.labels == label)
        count = max(1, round(share * len(rows)))
        labels[rows[smallest(seed, "labelled", keys[rows], count)]] = label
    return replace(data, labels=labels)
