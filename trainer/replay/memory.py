"""When a device has no memory left."""

from __future__ import annotations

import torch

# What PyTorch's CPU allocator, CUDA's runtime and cuBLAS say; all of them raise plain RuntimeErrors.
_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might have gone through."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


def free_memory(device: torch.device) -> None:
    """Give back what PyTorch keeps for later, once nothing refers to the tensors of a failed call."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
