"""The finite-sample floor of the measures: what a second set of real images would get in place of samples.

With as many images as there are, even a perfect generator has a Frechet distance above 0 and a precision below 1. The
second set goes through the same code as samples do, with its true classes as those asked for.

Where the reference is the test split, the second set is taken from the train split, as many images as there are samples
(or as many as there are). Where it is train and test together, the images of each class are split at random: one half
is measured against the other, and the counts, given beside the values, are smaller than those of the samples. A train
image was seen by the classifier: its accuracy there is that of a generator that repeats the train set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.shards import write_atomic
from trainer.evaluation.evaluate import Evaluator, evaluate
from trainer.evaluation.features import LabelledImages
from trainer.evaluation.generate import balanced_count
from trainer.evaluation.reference import TEST_ONLY, Reference

VERSION = 1  # of the measures: part of the cache's name, so changed ones are computed again
ROW_ONLY = ("evaluator", "fd_reference")


def real_floor(evaluator: Evaluator, after_task: int, samples: int) -> dict[str, Any]:
    """The row (`evaluate.evaluate`, less ROW_ONLY) of a second set of real images of the classes seen.

    Computed once for a data set, an evaluator and a number of samples. For one process only.

    Args:
        samples: how many the generated ones are.
    """
    identity = [VERSION, evaluator.id, evaluator.reference.id, evaluator.tasks[:after_task], samples]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
    path = evaluator.cache / f"floor-{name}.json"
    try:
        row = json.loads(path.read_bytes())
        if isinstance(row, dict) and "tasks" in row:
            return row
    except (OSError, ValueError):
        pass  # not there, or cut short: a cache is made again
    row = _measure(evaluator, after_task, samples)
    write_atomic(path, json.dumps(row, allow_nan=False).encode())
    return row


def _measure(evaluator: Evaluator, after_task: int, samples: int) -> dict[str, Any]:
    classes = evaluator.classes_seen(after_task)
    per_class = balanced_count(samples, len(classes)) // len(classes)
    reference = evaluator.reference
    halves = reference.split != TEST_ONLY
    parts = [evaluator.open_split(name) for name in (reference.split.split("+") if halves else ["train"])]
    labels = np.concatenate([part.labels for part in parts])
    shuffled = {label: _shuffled(labels, label) for label in np.unique(labels).tolist()}
    if halves:
        rest = np.concatenate([rows[len(rows) // 2 :] for rows in shuffled.values()])
        reference = Reference(reference.split, reference.features[rest], reference.labels[rest], reference.id)
        shuffled = {label: rows[: len(rows) // 2] for label, rows in shuffled.items()}
    chosen = np.concatenate([shuffled[label][:per_class] for label in classes if label in shuffled])
    images = evaluator.look(_read(parts, chosen), labels[chosen])
    row = evaluate(replace(evaluator, reference=reference), images, after_task)
    return {key: value for key, value in row.items() if key not in ROW_ONLY}


def _shuffled(labels: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    """The rows of a class, in an order that depends on the class and their number alone."""
    return np.random.default_rng(label).permutation(np.flatnonzero(labels == label))


def _read(parts: Sequence[LabelledImages], rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Images of data sets put one after the other, in the order of `rows`."""
    first, images = 0, []
    for part in parts:
        own = rows[(rows >= first) & (rows < first + len(part))]
        images.append((np.flatnonzero(np.isin(rows, own)), part.read(own - first)))
        first += len(part)
    order = np.argsort(np.concatenate([places for places, _ in images]))
    return np.concatenate([pixels for _, pixels in images])[order]
