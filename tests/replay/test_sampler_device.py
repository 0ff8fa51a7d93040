"""A sampler on another GPU than the first works there: events and graph captures go by the current device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from trainer.replay import sidecar
from trainer.run import RunDir


def test_the_samplers_gpu_is_the_current_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a teacher rank's is, `cuda:<LOCAL_RANK>` among all GPUs of the node."""
    current, worked_on = [torch.device("cuda:0")], list[torch.device]()

    class Worker:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def serve(self) -> None:
            worked_on.extend(current)

    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(sidecar, "open_device", torch.device)
    monkeypatch.setattr(sidecar, "Sampler", Worker)
    monkeypatch.setattr(sidecar.signal, "signal", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    sidecar.serve(RunDir(tmp_path), 0, 1, "cuda:2", 1)
    assert worked_on == [torch.device("cuda:2")]
