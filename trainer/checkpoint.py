"""A checkpoint on disk: full fp32 tensors as safetensors and one state.json, whatever the ranks and the ZeRO stage.

    <directory>/weights.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  [ema.safetensors]  state.json

Written beside its place under a temporary name, synced to the disk and renamed, so a directory of the final name is
whole. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.data.shards import fsync_directory
from trainer.errors import UserError

FORMAT = 1
STATE = "state.json"


class CheckpointWriter:
    """Writes one checkpoint piece by piece and publishes it whole.

    A failure (no disk) is kept in `.failure` instead of raised, so that the rank that writes keeps up with the
    collectives of the others; nothing is published then.
    """

    def __init__(self, directory: Path) -> None:
        self.failure: str | None = None
        self._directory = directory
        self._staging = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
        self._attempt(self._prepare)

    def write(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Add `<name>.safetensors`; tensors on the CPU, contiguous."""
        path = self._staging / f"{name}.safetensors"
        self._attempt(lambda: save_file(dict(tensors), path))

    def publish(self, state: Mapping[str, Any]) -> None:
        """Add the state and give the directory its name, in place of an older one of that name."""
        text = json.dumps({"format": FORMAT, **state}, indent=1)
        self._attempt(lambda: self._publish(text))
        if self.failure is not None:
            shutil.rmtree(self._staging, ignore_errors=True)

    def _attempt(self, action: Callable[[], Any]) -> None:
        if self.failure is not None:
            return
        try:
            action()
        except (OSError, SafetensorError) as error:
            self.failure = f"{self._directory}: the checkpoint could not be written ({error})"

    def _prepare(self) -> None:
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)

    def _publish(self, text: str) -> None:
        (self._staging / STATE).write_text(text)
        for path in (*self._staging.iterdir(), self._staging):
            fsync_directory(path)
        old = self._staging.with_suffix(".old")
        if self._directory.exists():
            self._directory.rename(old)
        self._staging.rename(self._directory)
        fsync_directory(self._directory.parent)
        shutil.rmtree(old, ignore_errors=True)


class CheckpointReader:
    """Reads a checkpoint tensor by tensor.

    Raises:
        UserError: one line naming the file that is missing, damaged or of another model.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        path = directory / STATE
        try:
            state = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: unreadable checkpoint ({error})") from None
        if not isinstance(state, dict) or state.get("format") != FORMAT:
            raise UserError(f"{path}: not a checkpoint of format {FORMAT}")
        self.state: dict[str, Any] = state

    def check(self, name: str, shapes: Mapping[str, torch.Size]) -> None:
        """Refuse a missing or damaged `<name>.safetensors`, and one with other tensors than these."""
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: unreadable checkpoint ({error})") from None
        expected = {key: tuple(shape) for key, shape in shapes.items()}
        for key in sorted(found.keys() | expected.keys()):
            if found.get(key) != expected.get(key):
                raise UserError(f"{path}: {key} is {found.get(key)} there and {expected.get(key)} in the model")

    def read(self, name: str, use: Callable[[Callable[[str], Tensor]], None]) -> None:
        """Call `use` with a function that reads one tensor of a checked file by its name, on the CPU."""
        with safe_open(self._path(name), framework="pt") as file:
            use(file.get_tensor)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.safetensors"
