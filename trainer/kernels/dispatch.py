"""Where kernels come from: Triton on CUDA where it is installed, PyTorch otherwise."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

from torch import Tensor


@functools.cache
def triton_module(name: str) -> ModuleType | None:
    """`trainer.kernels.<name>_triton`, imported on first use; None where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module(f"trainer.kernels.{name}_triton")


def kernels_for(tensor: Tensor, name: str) -> ModuleType | None:
    """The Triton kernels for a tensor on a CUDA device; None where PyTorch's own operations do the work."""
    return triton_module(name) if tensor.is_cuda else None
