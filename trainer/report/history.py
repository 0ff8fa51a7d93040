"""The picture of samples through time, from what a run directory keeps of them."""

from __future__ import annotations

import io

from trainer.report.source import Source
from trainer.tracking.grid import ClassSamples, history_grid, load_samples


def history_png(source: Source) -> bytes | None:
    """Samples after each task below real images, as PNG; None where the run keeps none.

    A run of a version that kept no real images has the picture itself.
    """
    run, tasks = source.run, source.task_classes
    paths = [run.picked_samples(task) for task in range(1, source.tasks + 1)]
    if not run.real_samples.exists() and run.history.exists():
        return run.history.read_bytes()
    if not tasks or not all(path.exists() for path in paths):
        return None
    steps = [load_samples(path) for path in paths]
    real: ClassSamples | None = load_samples(run.real_samples) if run.real_samples.exists() else None
    highest = max(label for classes in tasks for label in classes)
    names = [*source.class_names, *(str(label) for label in range(len(source.class_names), highest + 1))]
    picture = io.BytesIO()
    grid = history_grid(steps, tasks, names, f"{source.name}: samples after each task", real)
    grid.save(picture, format="PNG", optimize=True)
    return picture.getvalue()
