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

from trainer.kernels import noise_triton, philox_triton


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


@triton.jit
def pairs_kernel(u1: tl.tensor, u2: tl.tensor, cosine: tl.tensor, sine: tl.tensor, count: int) -> None:
    position = tl.program_id(0) * 1024 + tl.arange(0, 1024)
    inside = position < count
    first, second = philox_triton.to_normal2(
        tl.load(u1 + position, mask=inside, other=0.5), tl.load(u2 + position, mask=inside, other=0.5)
    )
    tl.store(cosine + position, first, mask=inside)
    tl.store(sine + position, second, mask=inside)


def main(directory: Path) -> None:
    with np.load(directory / "in.npz", allow_pickle=False) as arrays:
        inputs = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    results: dict[str, np.ndarray] = {}
    tables = [inputs[name] for name in ("seeds", "t", "signal", "sigma")]
    for case in json.loads((directory / "cases.json").read_text()):
        images = inputs[case["name"]].to(getattr(torch, case["image_dtype"]))
        flip, dtype = inputs["flip"] if case["flip"] else None, getattr(torch, case["dtype"])
        x, target = noise_triton.add_noise(images, *tables, flip=flip, predict_v=case["predict_v"], dtype=dtype)
        results[f"{case['name']}_x"], results[f"{case['name']}_target"] = x.float().numpy(), target.float().numpy()
    for count in (1, 3, 33, 105, 2100):
        results[f"uniform{count}"] = philox_triton.uniform(inputs["seeds"], count).numpy()
        results[f"normal{count}"] = philox_triton.normal(inputs["seeds"], count).numpy()
    counters = torch.cat([torch.arange(32), torch.arange(2**31 - 8, 2**31 + 8), torch.arange(2**40, 2**40 + 16)])
    integers = torch.zeros(len(inputs["seeds"]), 4, len(counters), dtype=torch.int32)
    integers_kernel[(len(inputs["seeds"]),)](inputs["seeds"], counters, integers, COUNT=len(counters))
    u1, u2 = inputs["u1"], inputs["u2"]
    cosine, sine = torch.empty_like(u1), torch.empty_like(u2)
    pairs_kernel[(triton.cdiv(len(u1), 1024),)](u1, u2, cosine, sine, len(u1))
    results |= {"pair_cosine": cosine.numpy(), "pair_sine": sine.numpy()}
    np.savez(directory / "out.npz", counters=counters.numpy(), integers=integers.numpy(), **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
