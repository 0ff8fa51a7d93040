"""The measures of samples after a task, over all classes seen and task by task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import EvaluationConfig
from trainer.evaluation.classifier import Classifier, Report, classifier_settings, load_or_train
from trainer.evaluation.features import FeatureExtractor, Float32, LabelledImages, build_extractor
from trainer.evaluation.frechet import frechet_of_features
from trainer.evaluation.kld import class_counts, class_kld
from trainer.evaluation.neighbours import overlap
from trainer.evaluation.reference import Reference, load_reference, split_features

CACHE_NAME = "evaluator"  # under the data root


@dataclass(frozen=True)
class Samples:
    """Generated images (n, C, H, W) and what the judges make of them: features (n, d), predicted class ids (n,).

    `asked`: the class ids asked for (n,); None for an unconditional model.
    """

    images: NDArray[np.uint8]
    asked: NDArray[np.int64] | None
    predicted: NDArray[np.int64]
    features: Float32

    def __len__(self) -> int:
        return len(self.images)


@dataclass(frozen=True)
class Evaluator:
    """The judge of a run: a classifier, a feature extractor, and the real images' features.

    `tasks[k - 1]` are the class ids of task k; `open_split` gives the images of "train" and "test" over all tasks of
    the data set at `root`.
    """

    extractor: FeatureExtractor
    classifier: Classifier
    reference: Reference
    tasks: tuple[tuple[int, ...], ...]
    root: Path
    open_split: Callable[[str], LabelledImages]

    @property
    def id(self) -> str:
        """Rows are comparable where this is equal.

        It changes when a task is appended to a configuration, because the classifier then knows more classes: rows
        made before are to be made again from their teachers.
        """
        names = [self.classifier.id] if self.extractor is self.classifier else [self.extractor.id, self.classifier.id]
        return "/".join([*names, self.reference.split])

    @property
    def cache(self) -> Path:
        """Where what is computed once for a data set is kept."""
        return self.root / CACHE_NAME

    def classes_seen(self, after_task: int) -> list[int]:
        return [label for task in self.tasks[:after_task] for label in task]

    def split_features(self, split: str, images: LabelledImages) -> Float32:
        """Features (N, d) of all images of a split, computed once for a data set."""
        return split_features(self.root, split, len(self.tasks), self.extractor, images, self.cache)

    def look(self, images: NDArray[np.uint8], asked: NDArray[np.int64] | None) -> Samples:
        """Put generated images before the judges."""
        return Samples(images, asked, self.classifier.predict(images), self.extractor.features(images))

    def evaluate(self, images: NDArray[np.uint8], asked: NDArray[np.int64] | None, after_task: int) -> dict[str, Any]:
        """Measure samples of the model learnt up to and including `after_task`; see `evaluate`."""
        return evaluate(self, self.look(images, asked), after_task)


def open_evaluator(
    config: EvaluationConfig,
    root: Path,
    tasks: Sequence[Sequence[int]],
    open_split: Callable[[str], LabelledImages],
    *,
    flip: bool,
    device: torch.device,
    report: Report | None = None,
) -> Evaluator:
    """The evaluator of a built data set; trains the classifier and computes the real features where not yet cached.

    To be called by one process first, while the others wait. The classifier's seed is fixed, so that all runs on a data
    set are measured by the same one.

    Args:
        root: the data set's directory.
        tasks: class ids of each task of the configuration, from task 1.
        open_split: gives the images of "train" and "test", over all the tasks.
        flip: whether mirrored images are images of the same class (`data.flip`).
        report: called after each epoch of the classifier with (epoch, epochs, loss).

    Raises:
        UserError: a missing index, extractor weights that are not there, a damaged cache.
    """
    cache = root / CACHE_NAME
    settings = classifier_settings(root, tasks, epochs=config.classifier_epochs, seed=0, flip=flip, device=device)
    classifier = load_or_train(cache, settings, open_split, device, report)
    extractor = build_extractor(config.extractor, config.extractor_path, classifier, device)
    reference = load_reference(root, len(tasks), extractor, open_split, cache)
    return Evaluator(extractor, classifier, reference, tuple(tuple(task) for task in tasks), root, open_split)


def evaluate(evaluator: Evaluator, samples: Samples, after_task: int) -> dict[str, Any]:
    """Measures of generated images of all classes seen, as JSON values.

    Args:
        after_task: the number of tasks learnt.

    Returns:
        fd: Frechet distance to the real images of all classes seen; precision, recall, density, coverage: see
        `neighbours.overlap`.
        kld: KL(real class shares || shares of predicted classes), see `kld.class_kld`.
        accuracy: share of samples predicted to be of the class asked for; None for an unconditional model.
        samples, real_images: how many of each; evaluator, fd_reference ("test" or "train+test").
        tasks: for each task learnt: task, samples, real_images, fd, precision, recall, density, coverage, accuracy,
        share (of all samples predicted to be of its classes). A task's samples are those asked to be of its classes,
        for an unconditional model those predicted to be. What is measured by features is None where they, or the real
        images, are fewer than `frechet.MIN_SAMPLES` (16).
    """
    seen = evaluator.classes_seen(after_task)
    return {
        **_by_features(evaluator, samples.features, seen),
        "kld": _kld(evaluator, samples.predicted, seen),
        "accuracy": _accuracy(samples.predicted, samples.asked),
        "evaluator": evaluator.id,
        "fd_reference": evaluator.reference.split,
        "tasks": [_task(evaluator, task, samples) for task in range(1, after_task + 1)],
    }


def _by_features(evaluator: Evaluator, features: Float32, classes: Sequence[int]) -> dict[str, Any]:
    real = evaluator.reference.of_classes(classes)
    counts = {"samples": len(features), "real_images": len(real)}
    return {"fd": frechet_of_features(features, real), **overlap(features, real), **counts}


def _task(evaluator: Evaluator, task: int, samples: Samples) -> dict[str, Any]:
    classes = evaluator.tasks[task - 1]
    predicted, asked = samples.predicted, samples.asked
    own = np.isin(predicted if asked is None else asked, classes)
    return {
        "task": task,
        **_by_features(evaluator, samples.features[own], classes),
        "accuracy": None if asked is None else _accuracy(predicted[own], asked[own]),
        "share": float(np.isin(predicted, classes).mean()),
    }


def _accuracy(predicted: NDArray[np.int64], asked: NDArray[np.int64] | None) -> float | None:
    return float(np.mean(predicted == asked)) if asked is not None and len(asked) else None


def _kld(evaluator: Evaluator, predicted: NDArray[np.int64], seen: Sequence[int]) -> float:
    known = evaluator.classifier.classes
    real = evaluator.reference.labels
    size = max(known) + 1
    columns = np.asarray(known)
    return class_kld(class_counts(real[np.isin(real, seen)], size)[columns], class_counts(predicted, size)[columns])
