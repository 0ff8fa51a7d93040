"""What a restart with `train.compile=true` waits for, with the compile cache of the first start and without.

    python benchmarks/compile_restart.py [--quick] [--json FILE]

Each start is a process of its own that builds the model, compiles it, and does one forward and one backward pass. The
gradients of all starts must be the same bits, and a start that finds the cache must compile no graph.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BAR = 5.0  # times faster
WRONG = 2


def start(cache: str, quick: bool) -> dict[str, Any]:
    """One start, measured in this process: seconds of its first step, its gradients' hash, the compiler's counts."""
    from trainer.compile_cache import use_compile_cache
    from trainer.run import RunDir

    use_compile_cache(RunDir(Path(cache)), cache)
    import torch
    from torch._dynamo.utils import counters

    from trainer.config import Config
    from trainer.steps import fresh_model
    from trainer.units import Units

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = Config()
    config.model.channels, config.model.norm_groups = ([8, 8], 4) if quick else ([32, 64], 8)
    config.model.max_classes = 10
    if device.type == "cuda" and not quick:  # the U-Net of 116 M parameters
        config.model.channels, config.model.layers_per_block = [128, 256, 384, 512], 3
        config.model.attention_levels, config.model.attention_head_dim = [2, 3], 64
        config.data.image_size, config.data.channels = 64, 3
    model = fresh_model(config)
    Units(model, gathered=False).compile()
    model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    size = config.data.image_size
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, config.data.channels, size, size, generator=generator).to(device)
    t = torch.arange(8, device=device)
    began = time.perf_counter()
    model(x, t, t).float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    digest = hashlib.sha256()
    for weight in model.parameters():
        assert weight.grad is not None
        digest.update(weight.grad.float().cpu().numpy().tobytes())
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "seconds": seconds,
        "gradients": digest.hexdigest(),
        "missed": counters["inductor"].get("fxgraph_cache_miss", 0),
        "hardware": name,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }


def launch(cache: str, quick: bool) -> dict[str, Any]:
    """The same in a new process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--start", cache, *(["--quick"] if quick else [])]
    dropped = ("TORCHINDUCTOR_", "TRITON_CACHE_DIR")
    environ = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    environ |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(repeats: int, quick: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Starts with an empty cache, each followed by one that finds it."""
    cold, warm = list[dict[str, Any]](), list[dict[str, Any]]()
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            cold.append(launch(cache, quick))
            warm.append(launch(cache, quick))
    return cold, warm


def quartiles(values: list[float]) -> list[float]:
    parts = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [round(parts[0], 3), round(parts[2], 3)]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="a small model, once")
    parser.add_argument("--start", metavar="CACHE", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.start:
        print(json.dumps(start(options.start, options.quick)))
        return 0
    cold, warm = measure(1 if options.quick else 3, options.quick)
    if len({run["gradients"] for run in cold + warm}) > 1 or any(run["missed"] for run in warm):
        print("error: a start that found the cache compiled again, or computed other gradients", file=sys.stderr)
        return WRONG
    ours, peer = [run["seconds"] for run in warm], [run["seconds"] for run in cold]
    ratio = statistics.median(peer) / statistics.median(ours)
    command = " ".join(["python", "benchmarks/compile_restart.py", *argv])
    row = {
        "claim": "first step of a restart, compiled code found in the run directory",
        "ours": round(statistics.median(ours), 3),
        "peer": round(statistics.median(peer), 3),
        "against": "a start that compiles",
        "unit": "s",
        "ratio": round(ratio, 2),
        "bar": BAR,
        "holds": ratio >= BAR,
        "hardware": cold[0]["hardware"],
        "command": command,
        "versions": cold[0]["versions"],
        "spread": {"ours": quartiles(ours), "peer": quartiles(peer)},
    }
    content = {"command": command, "hardware": row["hardware"], "versions": row["versions"], "rows": [row]}
    if options.json:
        options.json.write_text(json.dumps(content | {"starts": {"cold": cold, "warm": warm}}, indent=1) + "\n")
    print(f"first step: {row['peer']} s compiling, {row['ours']} s with the cache: {row['ratio']} times faster")
    return 0 if row["holds"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
