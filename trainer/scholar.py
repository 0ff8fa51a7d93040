"""The classifier that a run teaches beside its diffusion model, task by task: the solver of Shin et al. 2017.

    tasks/<k>/classifier/classifier.safetensors  card.json

What is replayed beside the images of a task goes by the method:

    taught by a teacher    images sampled from the diffusion model of the task before, soft labels
    experience_replay      the buffer's real images and labels
    joint                  nothing: the images of all tasks so far are learnt at once
    the others             nothing

Images are sampled as for an evaluation (`evaluation.steps`, ...), whatever the method asks its teacher for, as many of
each earlier class where the model takes classes. All ranks sample, the main rank trains. A classifier is a function of
what its card lists under `settings`; where one of these has changed, it is learnt again, and so are those after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from trainer.config import Config, Verify
from trainer.data.buffer import open_rehearsed
from trainer.data.dataset import TaskData
from trainer.data.remote import local_root, open_tasks
from trainer.data.shards import drop_stale, read_index, read_regular, sha256_file, task_directory, write_atomic
from trainer.evaluation.continual_classifier import (
    Lesson,
    Recipe,
    Replay,
    accuracy_row,
    classify,
    learn_task,
)
from trainer.evaluation.networks import Network, build_network, choose_architecture
from trainer.methods import Rehearsal, build_method, current_share
from trainer.models.teacher import read_card
from trainer.probe import Probe
from trainer.run import RunDir
from trainer.seeds import hash_key
from trainer.standing import asked_for
from trainer.steps import images_of_task
from trainer.tracking.tracker import Tracker
from trainer.world import World

WEIGHTS_NAME = "classifier.safetensors"
CARD_NAME = "card.json"  # written last, so its presence says that the file beside it is complete
CARD_LIMIT = 1 << 20  # bytes
VERSION = 1  # of what is done with the settings


class Scholar:
    """Teaches the classifier of a run, and knows how well it did."""

    def __init__(
        self,
        config: Config,
        run: RunDir,
        world: World,
        probe: Probe,
        tracker: Tracker,
        interrupting: Callable[[], AbstractContextManager[None]],
    ) -> None:
        """What takes long is done under `interrupting()`, which may raise Stopped."""
        self.config, self.run, self.world, self.tracker = config, run, world, tracker
        self._probe, self._interrupting = probe, interrupting
        method = build_method(config)
        self._rehearsal, self._all_tasks = method.rehearsal, method.all_tasks
        self._known: dict[int, dict[str, Any]] = {}  # cards that were found right, on the main rank
        self._digests: dict[tuple[str, int], str] = {}

    def learn(self, task: int) -> None:
        """Learn the tasks up to `task` that are not learnt yet, in order; collective. Nothing where none is asked for.

        Raises:
            UserError: images that cannot be read, on every rank.
            Stopped: on every rank.
        """
        if not self.config.classifier.epochs:
            return
        for number in range(1, task + 1):
            learnt = self.world.on_main(lambda number=number: self._learnt(number))
            if not self.world.any(self.world.is_main and not learnt):
                continue
            self.tracker.activity(f"the classifier learns task {number}")
            sampled = self._sampled(number) if self.config.needs_teacher and number > 1 else None
            self.world.on_main(lambda number=number, sampled=sampled: self._learn(number, sampled))

    def rows(self, task: int) -> list[dict[str, Any]]:
        """The accuracies after a task that was learnt, as part of its row, on the main rank; [] without one."""
        asked = asked_for(self.config)
        return [] if asked is None else [self._known[task]["row"] | {"classifier": asked}]

    # --- parts ---------------------------------------------------------------------------------------------------

    def _learnt(self, task: int) -> bool:
        """Whether the classifier after a task is there, as it would be made now; those before it are."""
        if task in self._known:
            return True
        card = self._card(task)
        if card is not None and card["settings"] == self._settings(task):
            self._known[task] = card
        return task in self._known

    def _card(self, task: int) -> dict[str, Any] | None:
        """The card of a classifier whose weights are those that it describes; None where there is none."""
        directory = self.run.classifier(task)
        drop_stale(directory)
        try:
            card = json.loads(read_regular(directory / CARD_NAME, CARD_LIMIT))
            whole = sha256_file(directory / WEIGHTS_NAME) == card["sha256"] and len(card["row"]["tasks"]) == task
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None
        return card if whole else None

    def _settings(self, task: int) -> dict[str, Any]:
        """All that decides what the classifier after a task is, as JSON values."""
        config, chosen = self.config, self.config.classifier
        tasks = range(1 if self._all_tasks else task, task + 1)
        settings: dict[str, Any] = {
            "architecture": choose_architecture(config.data.image_size, config.data.channels, self.world.device),
            "classes": config.classes_until(task),
            "epochs": chosen.epochs,
            "batch": chosen.batch,
            "lr": chosen.lr,
            "seed": config.run.seed,
            "flip": config.data.flip,
            "train": [self._digest("train", number) for number in tasks],
            "test": [self._digest("test", number) for number in range(1, task + 1)],
            "version": VERSION,
        }
        if task > 1:
            settings["previous"] = self._known[task - 1]["sha256"]
            settings |= self._replay_settings(task)
        return settings

    def _replay_settings(self, task: int) -> dict[str, Any]:
        config = self.config
        if config.needs_teacher:
            evaluation = config.evaluation
            return {
                "share": current_share(config, task),
                "teacher": read_card(self.run.teacher(task - 1)).teacher_id,
                "replay_images": config.classifier.replay_images,
                "temperature": config.classifier.temperature,
                "sampler": [evaluation.steps, evaluation.solver.value, evaluation.eta, evaluation.guidance],
            }
        if self._rehearsal is Rehearsal.buffer:
            buffers = [read_index(self.run.buffer(earlier)) for earlier in range(1, task)]
            shards = [shard.sha256 for index in buffers for shard in index.shards]
            return {"share": current_share(config, task), "buffer": shards}
        return {}

    def _digest(self, split: str, task: int) -> str:
        """Names the images of a task."""
        if (split, task) not in self._digests:
            index = read_index(task_directory(local_root(self.config.data), split, task))
            text = "".join(shard.sha256 for shard in index.shards)
            self._digests[split, task] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[split, task]

    def _sampled(self, task: int) -> NDArray[np.uint8]:
        """What is replayed with a task of the model before it; collective."""
        count = self.config.classifier.replay_images or len(self._images("train", [task]))
        return self._probe.replayed(task - 1, count)

    def _learn(self, task: int, sampled: NDArray[np.uint8] | None) -> None:
        config, device = self.config, self.world.device
        settings, lesson = self._settings(task), self._lesson(task, sampled)
        chosen = config.classifier
        recipe = Recipe(
            epochs=chosen.epochs,
            batch=chosen.batch,
            lr=chosen.lr,
            temperature=chosen.temperature,
            flip=config.data.flip,
            seed=hash_key(f"{config.run.seed}/classifier/{task}"),
        )

        def report(epoch: int, epochs: int, loss: float) -> None:
            self.tracker.activity(f"the classifier learns task {task}: epoch {epoch}/{epochs}")

        with self._interrupting():
            old = self._network(task - 1) if task > 1 else None
            network = learn_task(old, settings["architecture"], lesson, recipe, device, report)
            row = self._examine(task, network)
        self._publish(task, network, settings, row)
        self._tell(task, row)

    def _lesson(self, task: int, sampled: NDArray[np.uint8] | None) -> Lesson:
        data = self._images("train", list(range(1 if self._all_tasks else task, task + 1)))
        replay = None if sampled is None else Replay(sampled, None)
        if self._rehearsal is Rehearsal.buffer and task > 1:
            buffers = [self.run.buffer(earlier) for earlier in range(1, task)]
            kept = open_rehearsed(buffers, self.config.method, self.config.run.seed, Verify.size)
            replay = Replay(_all(kept), kept.labels)
        share = current_share(self.config, task)
        return Lesson(self.config.classes_until(task), _all(data), data.labels, replay, share)

    def _network(self, task: int) -> Network:
        """The classifier after a task, which is known to be whole."""
        settings, data = self._known[task]["settings"], self.config.data
        network = build_network(settings["architecture"], data.image_size, data.channels, len(settings["classes"]))
        network.load_state_dict(load_safetensors((self.run.classifier(task) / WEIGHTS_NAME).read_bytes()))
        return network

    def _examine(self, task: int, network: Network) -> dict[str, Any]:
        """Its accuracies on the test images of the tasks up to `task`."""
        parts = [self._images("test", [number]) for number in range(1, task + 1)]
        classes = self.config.classes_until(task)
        predicted = [classify(network, classes, _all(part), self.world.device) for part in parts]
        tasks = np.repeat(np.arange(1, task + 1), [len(part) for part in parts])
        return accuracy_row(np.concatenate(predicted), np.concatenate([part.labels for part in parts]), tasks)

    def _publish(self, task: int, network: Network, settings: dict[str, Any], row: dict[str, Any]) -> None:
        weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
        data, directory = save_safetensors(weights), self.run.classifier(task)
        card = {"sha256": hashlib.sha256(data).hexdigest(), "settings": settings, "row": row}
        (directory / CARD_NAME).unlink(missing_ok=True)  # or it would describe, for a moment, other weights
        write_atomic(directory / WEIGHTS_NAME, data)
        write_atomic(directory / CARD_NAME, json.dumps(card, indent=1).encode())
        self._known[task] = card

    def _tell(self, task: int, row: dict[str, Any]) -> None:
        accuracy = row["classifier_accuracy"]
        numbers = {"classifier_accuracy": accuracy, "task": task, "seen": images_of_task(self.config, task)}
        self.tracker.log(numbers, event="classifier")
        self.tracker.note(f"after task {task}: the classifier learnt with it is right on {100 * accuracy:.1f} %")

    def _images(self, split: str, tasks: list[int]) -> TaskData:
        return open_tasks(self.config.data, split, tasks)


def _all(data: TaskData) -> NDArray[np.uint8]:
    return data.read(np.arange(len(data), dtype=np.int64))
