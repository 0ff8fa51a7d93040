"""Judging a run: samples and measures after each task, their pictures, the result."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from trainer.config import Config, MethodName, OwnClassifier, Verify
from trainer.data.buffer import open_rehearsed
from trainer.data.remote import local_root, open_tasks
from trainer.evaluation.evaluate import Evaluator, Samples, evaluate, open_evaluator
from trainer.evaluation.floor import real_floor
from trainer.evaluation.forgetting import result, write_json
from trainer.evaluation.memorisation import memorisation
from trainer.evaluation.representation import probe_row
from trainer.evaluation.rows import merged
from trainer.probe import Answers, Probe
from trainer.run import RunDir
from trainer.scholar import Scholar
from trainer.steps import images_of_task
from trainer.tracking.grid import (
    ClassSamples,
    pick_samples,
    sample_grid,
    save_png,
    save_samples,
)
from trainer.tracking.table import best_level, number_text, percent_text
from trainer.tracking.tracker import Tracker
from trainer.world import World


class Judge:
    """Evaluates the model of each task. All ranks share what model and extractor compute, the main rank measures."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        tracker: Tracker,
        class_names: Sequence[str],
        interrupting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Collective: the main rank opens the evaluator (and trains the classifier once) while the others wait.

        What takes long is done under `interrupting()`, which may raise Stopped.
        """
        self.config, self.run, self.world, self.tracker = config, run, world, tracker
        self.class_names = list(class_names)
        self._interrupting = interrupting
        self._probe = Probe(config, run, world, interrupting)
        self._scholar = Scholar(config, run, world, self._probe, tracker, interrupting)
        self.tasks = config.data.tasks
        self._evaluator = world.main_first(self._open)

    def after(self, task: int) -> None:
        """Sample from the model learnt up to `task` and measure it, unless that has been done by this evaluator.

        Where the run teaches a classifier, that learns the task, too.
        """
        self._scholar.learn(task)
        if not self.world.any(self.world.is_main and self._stale(task)):
            return
        self.tracker.activity(f"evaluating after task {task}")
        answers = self._probe.ask(task, self._evaluator)
        self.world.on_main(lambda: self._measure(task, answers))

    def measure(self, task: int) -> dict[str, Any]:
        """Measures of the model learnt up to `task`, kept nowhere; on the main rank of a world of one."""
        assert self.world.size == 1, "one process alone"
        return self._examine(task, self._probe.ask(task, self._evaluator))[0]

    def finish(self, account: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Judge again what another evaluator judged, then write metrics.json.

        Args:
            account: what the run itself has to tell (`cost`, `replay`), asked for at the end on the main rank.

        Returns:
            The result on the main rank, {} on the others.
        """
        for task in range(1, len(self.tasks) + 1):
            self.after(task)
        return self.world.on_main(lambda: self._conclude(account())) or {}

    def _conclude(self, account: dict[str, Any]) -> dict[str, Any]:
        rows = [self._row(task) for task in range(1, len(self.tasks) + 1)]
        rows = [merged(row, *self._scholar.rows(task)) for task, row in enumerate(rows, 1) if row is not None]
        method, seed = self.config.method.name.value, self.config.run.seed
        content = result(method, rows, account.pop("cost"), seed=seed) | account
        save_samples(self.run.real_samples, self._real_samples())
        write_json(self.run.metrics, content)
        return content

    # --- parts ---------------------------------------------------------------------------------------------------

    def _open(self) -> Evaluator:
        config = self.config
        numbers = list(range(1, len(self.tasks) + 1))
        self.tracker.activity("opening the evaluator (its classifier is trained once for a data set)")
        with self._interrupting():
            return open_evaluator(
                config.evaluation,
                local_root(config.data),
                self.tasks,
                lambda split: open_tasks(config.data, split, numbers),
                flip=config.data.flip,
                device=self.world.device,
                report=lambda epoch, epochs, loss: self.tracker.activity(f"classifier: epoch {epoch}/{epochs}"),
            )

    def _measure(self, task: int, answers: Answers) -> None:
        with self._interrupting():
            row, samples = self._examine(task, answers)
        self._picture(task, samples)
        write_json(self.run.evaluation(task), row)
        self._tell(task, row)

    def _examine(self, task: int, answers: Answers) -> tuple[dict[str, Any], Samples]:
        """The row of a task, and its samples as the judges see them."""
        evaluator, samples = self._evaluator, answers.samples
        row = merged(evaluate(evaluator, samples, task), *answers.rows)
        row["floor"] = real_floor(evaluator, task, len(samples))
        row["nearest"] = self._nearest(evaluator, task, samples)
        if answers.represented is not None:
            settings = self.config.evaluation
            row["probe"] = probe_row(*answers.represented, settings.probe_timesteps, settings.probe_neighbours)
        return row | self._origin(task), samples

    def _nearest(self, evaluator: Evaluator, task: int, samples: Samples) -> dict[str, Any]:
        """How near the samples come to what was rehearsed while learning a task, and to the training images."""
        found: dict[str, Any] = {}
        if self.config.method.name is MethodName.experience_replay and task > 1:
            buffers = [self.run.buffer(earlier) for earlier in range(1, task)]
            kept = open_rehearsed(buffers, self.config.method, self.config.run.seed, Verify.size)
            found["buffer"] = memorisation(evaluator, samples, task, kept)
        if self.config.evaluation.nearest_training:
            found["training"] = memorisation(evaluator, samples, task)
        return found

    def _origin(self, task: int) -> dict[str, Any]:
        """What a row's samples come from, and what was measured: rows that differ in it are not put side by side."""
        settings = self.config.evaluation
        sampler = {name: getattr(settings, name) for name in ("steps", "eta", "guidance")}
        sampler["solver"] = settings.solver.value
        extent = {
            "samples": settings.samples,
            "loss": [settings.loss_images, settings.timestep_bins if settings.loss_images else 0],
            "bpd": [settings.bpd_images, settings.bpd_timesteps if settings.bpd_images else 0],
            "nearest_training": settings.nearest_training,
        }
        if self.config.model.classifier is not OwnClassifier.none:  # rows from before there was one stay as they are
            extent["classifier"] = "all test images"
        if settings.probe_images:
            extent["probe"] = [settings.probe_images, settings.probe_timesteps, settings.probe_neighbours]
        return {"task": task, "sampler": sampler, "extent": extent}

    def _row(self, task: int) -> dict[str, Any] | None:
        """The measures after a task, where they were taken."""
        try:
            row = json.loads(self.run.evaluation(task).read_bytes())
        except (OSError, ValueError):
            return None
        return row if isinstance(row, dict) else None

    def _stale(self, task: int) -> bool:
        row = self._row(task)
        if row is None or not self.run.picked_samples(task).exists():
            return True
        origin = {"evaluator": self._evaluator.id, **self._origin(task)}
        return any(row.get(key) != value for key, value in origin.items())

    def _picture(self, task: int, samples: Samples) -> None:
        classes = self.config.classes_until(task)
        per_class = self.config.evaluation.grid_per_class
        many = max(1000, 4 * per_class * len(classes))
        shown, predicted = samples.images[:many], samples.predicted[:many]
        asked = None if samples.asked is None else samples.asked[:many]
        picked = pick_samples(shown, asked, predicted, classes, per_class)
        save_samples(self.run.picked_samples(task), picked)
        title = f"{self.config.run.name}: samples after task {task}"
        save_png(self.run.samples(task), sample_grid(picked, self.tasks[:task], self.class_names, title))
        captions = [self.class_names[int(label)] for label in (predicted if asked is None else asked)]
        self.tracker.samples("samples", shown, captions)
        self.tracker.image("sample_grid", self.run.samples(task))

    def _real_samples(self) -> ClassSamples:
        """Real training images, for comparison in the picture over all tasks, which the report draws."""
        data = open_tasks(self.config.data, "train", list(range(1, len(self.tasks) + 1)))
        classes = self.config.classes_until(len(self.tasks))
        per_class = self.config.evaluation.grid_per_class
        chosen = np.concatenate([np.flatnonzero(data.labels == label)[:per_class] for label in classes])
        labels = data.labels[chosen]
        return pick_samples(data.read(chosen), labels, labels, classes, per_class)

    def _tell(self, task: int, row: dict[str, Any]) -> None:
        seen = images_of_task(self.config, task)
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.tracker.log({**numbers, **_probed(row), "task": task, "seen": seen}, event="evaluation")
        said = f"after task {task}: FD {number_text(row['fd'])}  KLD {row['kld']:.3f}"
        if row["accuracy"] is not None:
            said += f"  accuracy {percent_text(row['accuracy'])}"
        if "model_accuracy" in row:
            said += f"  its own classifier {percent_text(row['model_accuracy'])}"
        if (best := best_level(row, "linear")) is not None:
            said += f"  linear probe {percent_text(best.accuracy)} at t = {best.timestep}"
        self.tracker.note(said)


def _probed(row: Mapping[str, Any]) -> dict[str, float]:
    """What the probes reached, as numbers by name."""
    probe = row.get("probe") or {}
    return {
        f"probe_{kind}_t{timestep}": value
        for kind in ("linear", "knn")
        for timestep, value in zip(probe.get("timesteps", []), probe.get(kind, []), strict=True)
        if value is not None
    }
