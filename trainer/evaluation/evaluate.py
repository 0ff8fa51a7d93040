"""The measures after a task: Frechet distance, class mix and accuracy, over all classes seen and task by task."""

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
from trainer.evaluation.reference import Reference, load_reference

CACHE_NAME = "evaluator"  # under the data root


@dataclass(frozen=True)
class Evaluator:
    """The judge of a run: a classifier, a feature extractor, and the real images' features.

    `tasks[k - 1]` are the class ids of task k. Only one process needs it.
    """

    extractor: FeatureExtractor
    classifier: Classifier
    reference: Reference
    tasks: tuple[tuple[int, ...], ...]

    @property
    def id(self) -> str:
        """Rows are comparable where this is equal.

        It changes when a task is appended to a configuration, because the classifier then knows more classes: rows
        made before are to be made again from their teachers.
        """
        names = [self.classifier.id] if self.extractor is self.classifier else [self.extractor.id, self.classifier.id]
        return "/".join([*names, self.reference.split])

    def classes_seen(self, after_task: int) -> list[int]:
        return [label for task in self.tasks[:after_task] for label in task]

    def evaluate(self, images: NDArray[np.uint8], asked: NDArray[np.int64] | None, after_task: int) -> dict[str, Any]:
        """Measure samples of the model learnt up to and including `after_task`; see `evaluate`."""
        return evaluate(self, images, asked, after_task)


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

    To be called by one process while the others wait. The classifier's seed is fixed, so that all runs on a data set
    are measured by the same one.

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
    return Evaluator(extractor, classifier, reference, tuple(tuple(task) for task in tasks))


def evaluate(
    evaluator: Evaluator, images: NDArray[np.uint8], asked: NDArray[np.int64] | None, after_task: int
) -> dict[str, Any]:
    """Measures of generated images, as JSON values.

    Args:
        images: samples (n, C, H, W), of all classes seen.
        asked: class ids asked for (n,); None for an unconditional model.
        after_task: the number of tasks learnt.

    Returns:
        fd: Frechet distance to the real images of all classes seen.
        kld: KL(real class shares || shares of predicted classes), see `kld.class_kld`.
        accuracy: share of samples predicted to be of the class asked for; None for an unconditional model.
        samples, evaluator, fd_reference ("test" or "train+test").
        tasks: for each task learnt: task, samples, fd, accuracy, share (of all samples predicted to be of its classes).
        A task's samples are those asked to be of its classes, for an unconditional model those predicted to be. fd is
        None where they, or the real images, are fewer than `frechet.MIN_SAMPLES` (16).
    """
    predicted = evaluator.classifier.predict(images)
    features = evaluator.extractor.features(images)
    seen = evaluator.classes_seen(after_task)
    return {
        "fd": frechet_of_features(features, evaluator.reference.of_classes(seen)),
        "kld": _kld(evaluator, predicted, seen),
        "accuracy": _accuracy(predicted, asked),
        "samples": len(images),
        "evaluator": evaluator.id,
        "fd_reference": evaluator.reference.split,
        "tasks": [_task(evaluator, task, features, predicted, asked) for task in range(1, after_task + 1)],
    }


def _task(
    evaluator: Evaluator, task: int, features: Float32, predicted: NDArray[np.int64], asked: NDArray[np.int64] | None
) -> dict[str, Any]:
    classes = evaluator.tasks[task - 1]
    own = np.isin(predicted if asked is None else asked, classes)
    return {
        "task": task,
        "samples": int(own.sum()),
        "fd": frechet_of_features(features[own], evaluator.reference.of_classes(classes)),
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
