"""What is compiled is kept in the run directory, and found there by the next start."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch._inductor.runtime.cache_dir_utils import cache_dir

from trainer.compile_cache import use_compile_cache
from trainer.errors import UserError
from trainer.replay import command, sidecar
from trainer.run import RunDir

NAMES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE", "TORCHINDUCTOR_AUTOGRAD_CACHE")
ROOT = Path(__file__).resolve().parent.parent
COMPILE = """
import json, sys
from pathlib import Path
import torch._dynamo
from trainer.compile_cache import use_compile_cache
from trainer.run import RunDir

use_compile_cache(RunDir(Path(sys.argv[1])), "")
layer = torch.nn.Linear(3, 3)
layer.compile()
layer(torch.ones(2, 3)).square().sum().backward()
from torch._dynamo.utils import counters
print(json.dumps({"inductor": counters["inductor"], "autograd": counters["aot_autograd"]}))
"""


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Without the variables, and without them again afterwards."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that monkeypatch takes away what is set meanwhile
        monkeypatch.delenv(name)
    return monkeypatch


def test_caches_live_in_the_run_directory(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.chdir(tmp_path)
    use_compile_cache(RunDir(Path("runs/first")), "")
    cache = tmp_path / "runs" / "first" / "compile_cache"
    assert [os.environ[name] for name in NAMES] == [str(cache / "inductor"), str(cache / "triton"), "1", "1"]


def test_the_default_that_importing_torch_leaves_is_nobodys_wish(
    environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    environment.setenv("TORCHINDUCTOR_CACHE_DIR", cache_dir())
    use_compile_cache(RunDir(tmp_path), "")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile_cache" / "inductor")


def test_a_place_of_its_own_and_what_the_environment_says(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.setenv("TRITON_CACHE_DIR", "mine")
    use_compile_cache(RunDir(tmp_path / "run"), str(tmp_path / "elsewhere"))
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "elsewhere" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_a_place_that_is_no_directory_is_refused(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in ("file", "file/below"):
        with pytest.raises(UserError, match=f"train.compile_cache=.*{place}: "):
            use_compile_cache(RunDir(tmp_path), str(tmp_path / place))
    assert not set(NAMES) & os.environ.keys()


def test_samplers_use_it_too(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: dict[str, str] = {}

    def serve(*_: Any, **__: Any) -> None:
        seen.update(os.environ)

    def leave(code: int) -> None:
        raise SystemExit(code)

    environment.setattr(sidecar, "serve", serve)
    environment.setattr(command.os, "_exit", leave)
    with pytest.raises(SystemExit):
        command.sampler_main(["--run", str(tmp_path)])
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "compile_cache" / "inductor")


@pytest.mark.skipif(shutil.which("g++") is None, reason="without a C++ compiler nothing is compiled for the CPU")
def test_a_second_start_compiles_nothing(tmp_path: Path) -> None:
    """Counted by TorchInductor itself: misses the first time, hits the second."""
    environ = {name: value for name, value in os.environ.items() if name not in NAMES} | {"PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-c", COMPILE, str(tmp_path)]
    starts = [subprocess.run(arguments, env=environ, capture_output=True, check=True, text=True) for _ in range(2)]
    first, second = (json.loads(start.stdout) for start in starts)
    assert first["inductor"]["fxgraph_cache_miss"] == 2 and first["autograd"]["autograd_cache_miss"] == 1
    assert second["inductor"]["fxgraph_cache_hit"] == 2 and second["autograd"]["autograd_cache_hit"] == 1
    assert "fxgraph_cache_miss" not in second["inductor"] and "autograd_cache_miss" not in second["autograd"]
    assert any((tmp_path / "compile_cache" / "inductor" / "fxgraph").rglob("*"))
