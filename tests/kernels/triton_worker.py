"""Runs Triton kernels on the cases of a test; started by `interpreter.interpret` with TRITON_INTERPRET=1.

Reads in.npz and cases.json from the directory given, writes out.npz (16-bit results as float32).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path.cwd()))

from trainer.kernels import ddim_triton, loss_triton, noise_triton, philox_triton
from trainer.kernels.launch import cut

Arrays = dict[str, torch.Tensor]


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


def noise(cases: list[dict[str, Any]], inputs: Arrays) -> Arrays:
    results: Arrays = {}
    tables = [inputs[name] for name in ("seeds", "t", "signal", "sigma")]
    for case in cases:
        images = inputs[case["name"]].to(getattr(torch, case["image_dtype"]))
        flip, dtype = inputs["flip"] if case["flip"] else None, getattr(torch, case["dtype"])
        x, target = noise_triton.add_noise(images, *tables, flip=flip, predict_v=case["predict_v"], dtype=dtype)
        results |= {f"{case['name']}_x": x, f"{case['name']}_target": target}
    seeds = inputs["seeds"]
    for count in (1, 3, 33, 105, 2100):
        results[f"uniform{count}"] = philox_triton.uniform(seeds, count)
        results[f"normal{count}"] = philox_triton.normal(seeds, count)
    counters = torch.cat([torch.arange(32), torch.arange(2**31 - 8, 2**31 + 8), torch.arange(2**40, 2**40 + 16)])
    integers = torch.zeros(len(seeds), 4, len(counters), dtype=torch.int32)
    integers_kernel[(len(seeds),)](seeds, counters, integers, COUNT=len(counters))
    u1, u2 = inputs["u1"], inputs["u2"]
    cosine, sine = torch.empty_like(u1), torch.empty_like(u2)
    pairs_kernel[(triton.cdiv(len(u1), 1024),)](u1, u2, cosine, sine, len(u1))
    return results | {"counters": counters, "integers": integers, "pair_cosine": cosine, "pair_sine": sine}


def ddim(cases: list[dict[str, Any]], inputs: Arrays) -> Arrays:
    results: Arrays = {}
    for case in cases:
        x, prediction, null, coefficients = (
            inputs[f"{case['name']}_{kind}"] for kind in ("x", "prediction", "null", "coefficients")
        )
        dtype = getattr(torch, case["dtype"])
        x_next, x0 = ddim_triton.ddim_update(
            x,
            prediction.to(dtype),
            coefficients,
            predict_v=case["predict_v"],
            clip=case["clip"],
            null_prediction=null.to(dtype) if case["guidance"] != 1.0 else None,
            guidance=case["guidance"],
            seeds=inputs["seeds"] if case["noisy"] else None,
            with_x0=case["with_x0"],
        )
        results[f"{case['name']}_x_next"] = x_next
        if x0 is not None:
            results[f"{case['name']}_x0"] = x0
    return results


def loss(cases: list[dict[str, Any]], inputs: Arrays) -> Arrays:
    results: Arrays = {}
    for case in cases:
        name, dtypes = case["name"], case["dtypes"]
        prediction = inputs[f"{name}_prediction"].to(getattr(torch, dtypes[0]))
        targets = inputs[f"{name}_target"].to(getattr(torch, dtypes[1])).split(case["rows"])
        weights = inputs[f"{name}_weights"] if case["per_sample"] else case["weights"]
        blocks = cut(prediction[0].numel(), prediction.dtype, case["block"])
        gradient = bool(case["with_gradient"])
        found = loss_triton.weighted_squared_error(prediction, targets, weights, with_gradient=gradient, blocks=blocks)
        results |= {f"{name}_loss": found[0], f"{name}_means": found[1]}
        if found[2] is not None:
            results[f"{name}_gradient"] = found[2]
    loss_triton.SCALE_PROGRAMS = 2  # for three blocks: one takes two
    for scale in (1.0, 0.25):
        results[f"scaled{scale}"] = loss_triton.scale_(inputs["unscaled"].clone(), torch.tensor(scale))
    return results


def main(name: str, directory: Path) -> None:
    with np.load(directory / "in.npz", allow_pickle=False) as arrays:
        inputs = {key: torch.from_numpy(arrays[key]) for key in arrays.files}
    results = {"noise": noise, "ddim": ddim, "loss": loss}[name](
        json.loads((directory / "cases.json").read_text()), inputs
    )
    halves = (torch.float16, torch.bfloat16)
    plain = {key: value.float() if value.dtype in halves else value for key, value in results.items()}
    np.savez(directory / "out.npz", **{key: value.numpy() for key, value in plain.items()})


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
