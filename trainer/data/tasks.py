"""How the classes of a data set are split into tasks: a pure function of the configuration."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trainer.errors import ConfigError
from trainer.seeds import derive


def split_classes(
    classes: int,
    classes_per_task: int,
    class_order_seed: int | None = None,
    *,
    order: Sequence[int] = (),
    tasks: Sequence[Sequence[int]] = (),
) -> list[list[int]]:
    """Class ids of each task, in the order of learning.

    Args:
        classes: number of classes; ids are 0..classes-1.
        classes_per_task: size of each task.
        class_order_seed: shuffles the classes before they are cut into tasks; None keeps the order of the ids.
        order: a given order instead (some or all ids).
        tasks: explicit tasks instead of a split.

    Raises:
        ConfigError: a split that cannot be made, naming the key.
    """
    if tasks:
        return _explicit(classes, tasks)
    if classes_per_task < 1 or classes % classes_per_task:
        raise ConfigError(
            f"data.classes_per_task={classes_per_task}: data.classes={classes} does not divide into such tasks"
        )
    chosen = list(order)
    if not chosen:
        chosen = list(range(classes))
        if class_order_seed is not None:
            ranks = derive(class_order_seed, "class-order", np.arange(classes, dtype=np.uint64))
            chosen = [int(label) for label in np.argsort(ranks, kind="stable")]
    if len(chosen) % classes_per_task:
        raise ConfigError(f"data.classes_per_task={classes_per_task}: {len(chosen)} ordered classes do not divide")
    return _explicit(classes, [chosen[i : i + classes_per_task] for i in range(0, len(chosen), classes_per_task)])


def _explicit(classes: int, tasks: Sequence[Sequence[int]]) -> list[list[int]]:
    seen: set[int] = set()
    for number, task in enumerate(tasks, 1):
        if not task:
            raise ConfigError(f"data.tasks: task {number} has no class")
        for label in task:
            if not 0 <= label < classes:
                raise ConfigError(f"data.tasks: class {label} of task {number} is not one of data.classes={classes}")
            if label in seen:
                raise ConfigError(f"data.tasks: class {label} occurs twice (again in task {number})")
            seen.add(label)
    return [list(task) for task in tasks]
