"""Where compiled code is kept between two starts: TorchInductor's and Triton's caches, in the run directory.

Both find a kernel again by a hash of all that it was made from (source, settings, versions, device) and publish by
renaming, so that the processes of a node share one directory. Inductor's holds pickles and machine code.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from trainer.errors import UserError
from trainer.run import RunDir

# FX graph cache: what Inductor made of a graph. AOTAutograd cache: how forward and backward were cut apart before it.
_SWITCHES = ("TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")
_PLACES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def use_compile_cache(run: RunDir, place: str) -> Path:
    """Have this process and its children keep what they compile; what a person set in the environment stays.

    To be called before anything is compiled: the caches are looked up then, by their environment variables.

    Args:
        place: `train.compile_cache`; empty for the run directory.

    Returns:
        The directory. It is made by the first compiler that writes there.

    Raises:
        UserError: `place` is no directory that can be written.
    """
    root = Path(place).absolute() if place else run.compile_cache.absolute()
    if place:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"train.compile_cache={place}: {error.strerror}") from None
        if not os.access(root, os.W_OK | os.X_OK):
            raise UserError(f"train.compile_cache={place}: cannot be written")
    _forget_default()
    for name, directory in _PLACES.items():
        os.environ.setdefault(name, str(root / directory))
    for name in _SWITCHES:
        os.environ.setdefault(name, "1")
    return root


def _forget_default() -> None:
    """Importing torch._dynamo, which diffusers does, puts Inductor's default directory into the environment."""
    if "torch._inductor" not in sys.modules:
        return
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    if os.environ.get("TORCHINDUCTOR_CACHE_DIR") == str(Path(default_cache_dir()).absolute()):
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
