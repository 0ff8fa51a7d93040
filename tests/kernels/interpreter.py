"""Runs a worker of these tests in Triton's interpreter, which Triton must find switched on when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def interpret(name: str, directory: Path, cases: list[dict[str, Any]], inputs: Mapping[str, ArrayLike]) -> Any:
    """The arrays that `triton_worker.py <name>` writes, given cases.json and in.npz in `directory`."""
    np.savez(directory / "in.npz", **{key: np.asarray(value) for key, value in inputs.items()})
    (directory / "cases.json").write_text(json.dumps(cases))
    worker = Path(__file__).with_name("triton_worker.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(worker), name, str(directory)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(directory / "out.npz", allow_pickle=False) as results:
        return dict(results)
