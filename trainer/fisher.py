"""What penalties keep of a task: its weights, which are its teacher's, and what its gradients say about them.

    tasks/<k>/fisher/fisher.safetensors  card.json

theta_k are the weights that are published as the teacher after task k: the average, where there is one (`ema.decay`).
They are what is judged and handed on as the model of tasks 1 to k, so they are what is to be kept, and the gradients
are taken there. The student itself goes on from its own weights, as without a penalty.

Gradients are those of single samples, a micro-batch of one each: the expectation of a squared gradient is not that of a
squared mean (van de Ven 2025, arXiv 2502.11756). A sample is a real image of the task as a training step would see it,
at a timestep, with a noise and a flip of its own. Each rank takes its share of them on a whole fp32 copy of the model,
which is given back before training goes on. The files hold full tensors by parameter name, whatever ranks and stage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialise
from torch import Tensor

from trainer.config import Config
from trainer.data.batch import Examples
from trainer.data.dataset import TaskData
from trainer.data.label_dropout import LabelDropout
from trainer.data.prepare import Preparer
from trainer.data.remote import open_tasks
from trainer.data.shards import drop_stale, read_regular, sha256_file, write_atomic
from trainer.data.stream import HostBatch
from trainer.engine import Engine
from trainer.errors import UserError, one_line
from trainer.methods import Memory, Penalty
from trainer.methods.base import Weights, current_loss
from trainer.models.denoiser import Denoiser
from trainer.models.teacher import CARD_NAME, WEIGHTS_NAME, check_teacher, load_teacher
from trainer.run import RunDir
from trainer.seeds import smallest
from trainer.world import World

FISHER_NAME = "fisher.safetensors"
CARD_LIMIT = 1 << 16  # bytes of card.json
CHUNK = 32  # samples prepared at once, between two looks at whether to stop


@dataclass(frozen=True)
class FisherCard:
    """`card.json`; written last, so its presence says that the file beside it is complete."""

    penalty: str
    teacher_id: str  # of the weights at which the gradients were taken
    sha256: str  # of fisher.safetensors
    samples: int
    scale: float  # `Memory.scale`


class SampleGradients:
    """The gradients of one sample after another, of this rank's share of a task's samples; collective."""

    def __init__(self, model: Denoiser, data: TaskData, draws: int, prepare: Preparer, world: World) -> None:
        """Args:
        model: on the device, fp32; its gradients are asked for, none are left behind.
        data: the images, each used `draws` times.
        """
        self._model, self._data, self._draws, self._prepare, self._world = model, data, draws, prepare, world
        self._parameters = list(model.parameters())
        self.samples = len(data) * draws

    def walk(self, pause: Callable[[], None]) -> Iterator[tuple[Tensor, ...]]:
        """In the order of the model's parameters; `pause` is called equally often on every rank."""
        mine = np.arange(self._world.rank, self.samples, self._world.size)
        for start in range(0, -(-self.samples // self._world.size), CHUNK):
            pause()
            chosen = mine[start : start + CHUNK]
            if not len(chosen):
                continue
            examples = self._prepare(self._batch(chosen))
            for row in range(len(examples)):
                yield self._gradient(examples.rows(slice(row, row + 1)))

    def _batch(self, numbers: NDArray[np.int64]) -> HostBatch:
        indices, draws = np.divmod(numbers, self._draws)
        return HostBatch(
            images=torch.from_numpy(self._data.read(indices)),
            labels=torch.from_numpy(self._data.labels[indices]),
            keys=self._data.keys[indices],
            draws=draws.astype(np.uint64),
        )

    def _gradient(self, sample: Examples) -> tuple[Tensor, ...]:
        return torch.autograd.grad(current_loss(self._model, sample, Weights())["loss"], self._parameters)


class Consolidation:
    """Measures the tasks of a run once, and recalls them for the engine."""

    def __init__(self, config: Config, run: RunDir, world: World, pause: Callable[[], None]) -> None:
        """`pause` is called now and then while a task is measured, by every rank equally often; it may raise."""
        self.config, self.run, self.world, self._pause = config, run, world, pause

    def hold(self, engine: Engine, penalty: Penalty, task: int, note: Callable[[str], None]) -> None:
        """Have the engine hold on to the tasks before `task`; measures those that are not yet; collective.

        Raises:
            UserError: a file that is damaged, or of another teacher.
        """
        earliest = 1 if penalty.needs_fisher else task - 1
        for earlier in range(earliest, task):
            if penalty.needs_fisher and self.world.any(self.world.is_main and not self._measured(earlier)):
                note(f"measuring the Fisher information of task {earlier}")
                self._measure(penalty, earlier)
            penalty.remember(self._recall(engine, penalty, earlier))
        engine.hold(penalty)

    def _measured(self, task: int) -> bool:
        return (self.run.fisher(task) / CARD_NAME).exists()

    def _measure(self, penalty: Penalty, task: int) -> None:
        config, device = self.config, self.world.device
        model, schedule, teacher = load_teacher(self.run.teacher(task), device)
        model.requires_grad_(True)
        prepare = Preparer(
            schedule,
            seed=config.run.seed,
            purpose=f"fisher/{task}",
            flip=config.data.flip,
            device=device,
            dtype=torch.float32,
            label_dropout=LabelDropout.of(config),
        )
        everything = open_tasks(config.data, "train", [task])
        data = everything.subset(choose(everything, config.method.fisher_images, config.run.seed, task))
        gradients = SampleGradients(model, data, config.method.fisher_draws, prepare, self.world)
        weights = [parameter.detach() for parameter in model.parameters()]
        fisher, scale = penalty.estimate(
            lambda: gradients.walk(self._pause), weights, gradients.samples, self.world.sum
        )
        names = [name for name, _ in model.named_parameters()]
        tensors = dict(zip(names, fisher, strict=True))
        name, samples = config.penalty.value, gradients.samples
        self.world.on_main(
            lambda: save_fisher(self.run.fisher(task), tensors, name, teacher.teacher_id, samples, scale)
        )

    def _recall(self, engine: Engine, penalty: Penalty, task: int) -> Memory:
        directory, teacher = self.run.fisher(task), self.run.teacher(task)
        self.world.on_main(lambda: self._check(engine, penalty, task))
        with safe_open(teacher / WEIGHTS_NAME, framework="pt") as file:
            weights = engine.part(file.get_tensor)
        if not penalty.needs_fisher:
            return Memory(weights)
        card = read_fisher_card(directory)
        with safe_open(directory / FISHER_NAME, framework="pt") as file:
            return Memory(weights, engine.part(file.get_tensor), card.scale)

    def _check(self, engine: Engine, penalty: Penalty, task: int) -> None:
        teacher = check_teacher(self.run.teacher(task))
        if penalty.needs_fisher:
            shapes = {name: tuple(shape) for name, shape in engine.shapes.items()}
            check_fisher(self.run.fisher(task), self.config.penalty.value, teacher.teacher_id, shapes)


def choose(data: TaskData, count: int, seed: int, task: int) -> NDArray[np.int64]:
    """Indices of `count` images, or of all where there are fewer: a pure function of (seed, task) and the keys."""
    return smallest(seed, f"fisher/{task}/image", data.keys, count)


def save_fisher(
    directory: Path, tensors: dict[str, Tensor], penalty: str, teacher_id: str, samples: int, scale: float
) -> None:
    """Publish what a task left: the tensors by parameter name first, the card last, each atomically."""
    data = serialise({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    card = FisherCard(penalty, teacher_id, hashlib.sha256(data).hexdigest(), samples, scale)
    write_atomic(directory / FISHER_NAME, data)
    write_atomic(directory / CARD_NAME, json.dumps(asdict(card), indent=1).encode())


def read_fisher_card(directory: Path) -> FisherCard:
    """Raises UserError, naming the file, where it is missing or not such a card."""
    path = directory / CARD_NAME
    drop_stale(directory)
    try:
        content = json.loads(read_regular(path, CARD_LIMIT))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)}); {_mend(directory)}") from None
    kinds = {"penalty": str, "teacher_id": str, "sha256": str, "samples": int, "scale": float}
    assert kinds.keys() == {field.name for field in fields(FisherCard)}
    if not isinstance(content, dict) or {key: type(value) for key, value in content.items()} != kinds:
        raise UserError(f"{path}: not the card of a Fisher information; {_mend(directory)}")
    return FisherCard(**content)


def check_fisher(directory: Path, penalty: str, teacher_id: str, shapes: dict[str, tuple[int, ...]]) -> None:
    """Refuse what is damaged, was measured at other weights or for another penalty, or is of another model.

    Raises:
        UserError: naming the file.
    """
    card, path = read_fisher_card(directory), directory / FISHER_NAME
    if (card.penalty, card.teacher_id) != (penalty, teacher_id):
        raise UserError(f"{directory / CARD_NAME}: of another teacher or penalty; {_mend(directory)}")
    try:
        if sha256_file(path) != card.sha256:
            raise UserError(f"{path}: damaged: its sha256 is not the card's; {_mend(directory)}")
        with safe_open(path, framework="pt") as file:
            found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: unreadable ({one_line(error)}); {_mend(directory)}") from None
    if found != shapes:
        raise UserError(f"{path}: of another model; {_mend(directory)}")


def _mend(directory: Path) -> str:
    return f"delete {directory}, and it is measured again"
