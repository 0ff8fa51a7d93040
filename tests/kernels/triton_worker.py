"""Runs the Triton kernels on the cases of test_noise.py; started by it with TRITON_INTERPRET=1.

Reads in.npz and cases.json from the directory given, writes out.npz (floating results as float32).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path.cwd()))

from trainer.kernels import noise_triton as kernels


@triton.jit
def integers_kernel(seeds: tl.tensor, counters: tl.tensor, out: tl.tensor, COUNT: tl.constexpr) -> None:
    row = tl.program_id(0)
    position = tl.arange(0, COUNT)
    lanes = tl.randint4x(tl.load(seeds + row), tl.load(counters + position))
    base = out + row * 4 * COUNT + position
    tl.store(base, lanes[0].to(tl.int32, bitcast=True))
    tl.store(base + COUNT, lanes[1].to(tl.int32, bitcast=True))
    tl.store(base + 2 * COUNT, lanes[2].to(tl.int32, bitcast=True))
    tl.store(base + 3 * COUNT, lanes[3].to(tl.int32, bitcast=True))


def main(directory: Path) -> None:
    with np.load(directory / "in.npz", allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    results: dict[str, np.ndarray] = {}
    tables = [inputs[name] for name in ("seeds", "t", "signal", "sigma")]
    for case in json.loads((directory / "cases.json").read_text()):
        images = inputs[case["name"]].to(getattr(torch, case["image_dtype"]))
        flip, dtype = inputs["flip"] if case["flip"] else None, getattr(torch, case["dtype"])
        x, target = kernels.add_noise(images, *tables, flip=flip, predict_v=case["predict_v"], dtype=dtype)
        results[f"{case['name']}_x"], results[f"{case['name']}_target"] = x.float().numpy(), target.float().numpy()
    for count in (1, 3, 33, 105, 2100):
        results[f"uniform{count}"] = kernels.uniform(inputs["seeds"], count).numpy()
        results[f"normal{count}"] = kernels.normal(inputs["seeds"], count).numpy()
    counters = torch.cat([torch.arange(32), torch.arange(2**31 - 8, 2**31 + 8), torch.arange(2**40, 2**40 + 16)])
    integers = torch.zeros(len(inputs["seeds"]), 4, len(counters), dtype=torch.int32)
    integers_kernel[(len(inputs["seeds"]),)](inputs["seeds"], counters, integers, COUNT=len(counters))
    np.savez(directory / "out.npz", counters=counters.numpy(), integers=integers.numpy(), **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
