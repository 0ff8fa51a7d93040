"""Counts the machine instructions of the kernels for sm_90, compiled without a GPU.

    python benchmarks/sass.py --json benchmarks/results/sass.json

For each kernel at its usual size: instructions of one thread over the elements that it computes (slow paths counted
as if they ran; the kernels here have none), registers, shared memory, barriers and the widths of loads and stores.
The noise kernel from uint8 to bf16 came to 40.5 per element this way, where one with the library's logarithm, sine and
cosine has 175 (80 of them run: what reduces large angles is jumped over), 15 barriers and 8-byte stores; both for
samples of 3 x 64 x 64 under Triton 3.9 (40.5 under 3.6, too).

A kernel bound by instructions needs `per element * elements / (128 lanes * multiprocessors * clock)` seconds at least.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from trainer.kernels import ddim_triton, loss_triton, noise_triton, philox_triton
from trainer.kernels.launch import cut

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)")


@dataclass(frozen=True)
class Case:
    """A kernel and what it is compiled for: types of its pointers, integers (divisible by 16), constants."""

    name: str
    kernel: Any
    pointers: dict[str, str]
    integers: tuple[str, ...]
    constants: dict[str, Any]
    elements: int  # of one program
    num_warps: int
    scalars: dict[str, str] = field(default_factory=dict)
    divisible: bool = True


def noise_case(image: str = "u8", output: str = "bf16", *, count: int = 3 * 64 * 64, **options: bool) -> Case:
    """`flip`, `predict_v` and the sizes of samples as asked for."""
    quarter = (count + 3) // 4
    blocks = cut(quarter, TYPES[output])
    pointers = {"images": image, "seeds": "i64", "timesteps": "i64", "signals": "fp32", "sigmas": "fp32", "flips": "u8"}
    constants = {"WIDTH": 64, "FLIP": options.get("flip", False), "PREDICT_V": options.get("predict_v", False)}
    constants |= {"EVEN": blocks.even and count % 4 == 0, "BLOCKS": blocks.count, "BLOCK": blocks.size}
    return Case(
        name=" ".join([f"noise of {count}", image, "->", output, *(name for name, on in options.items() if on)]),
        kernel=noise_triton._noise_kernel,
        pointers=pointers | {"x_out": output, "target_out": output},
        integers=("count", "quarter"),
        constants=constants,
        elements=4 * blocks.size,
        num_warps=blocks.num_warps,
        divisible=count % 64 == 0,
    )


def ddim_case(prediction: str = "bf16", *, count: int = 3 * 64 * 64, guidance: float = 1.0, **options: bool) -> Case:
    """`noise`, `with_x0` and `predict_v` as asked for."""
    quarter = (count + 3) // 4
    blocks = cut(quarter, torch.float32)
    constants = {name.upper(): options.get(name, False) for name in ("predict_v", "noise", "with_x0")}
    constants |= {"CLIP": True, "GUIDANCE": guidance, "EVEN": blocks.even and count % 4 == 0}
    guided = ["guided"] if guidance != 1.0 else []
    return Case(
        name=" ".join([f"ddim of {count}", prediction, *guided, *(name for name, on in options.items() if on)]),
        kernel=ddim_triton._ddim_kernel,
        pointers={"states": "fp32", "predictions": prediction, "null_predictions": prediction, "coefficients": "fp32"}
        | {"seeds": "i64", "x_next": "fp32", "x0_out": "fp32"},
        integers=("batch", "count", "quarter"),
        constants=constants | {"BLOCKS": blocks.count, "BLOCK": blocks.size},
        elements=4 * blocks.size,
        num_warps=blocks.num_warps,
        divisible=count % 64 == 0,
    )


def loss_case(kind: str = "bf16", *, count: int = 3 * 64 * 64, per_sample: bool = False) -> Case:
    """Loss and gradient of predictions and targets of one type."""
    blocks = cut(count, TYPES[kind])
    constants = {"PER_SAMPLE": per_sample, "GRADIENT": True, "EVEN": blocks.even, "PROGRAMS": blocks.count}
    return Case(
        name=" ".join([f"loss of {count}", kind, *(["per_sample"] if per_sample else [])]),
        kernel=loss_triton._loss_kernel,
        pointers={"predictions": kind, "first_targets": kind, "second_targets": kind, "weights": "fp32"}
        | {"gradients": kind, "sums": "fp32"},
        integers=("first_rows", "count"),
        constants=constants | {"REPEATS": 1, "BLOCK": blocks.size},
        elements=blocks.size,
        num_warps=blocks.num_warps,
        scalars=dict.fromkeys(("first_factor", "second_factor"), "fp32"),
        divisible=count % 64 == 0,
    )


def sum_case(per_sample: bool) -> Case:
    """The second stage of the loss."""
    names = ("first_weight", "second_weight", "first_scale", "second_scale")
    return Case(
        name="sum" + " per_sample" * per_sample,
        kernel=loss_triton._sum_kernel,
        pointers=dict.fromkeys(("sums", "weights", "loss", "means"), "fp32"),
        integers=("first_sums",),
        constants={"PER_SAMPLE": per_sample, "PARTS": 2, "SUMS": 3072, "PROGRAMS": 12, "BLOCK": loss_triton.SUM_BLOCK},
        elements=loss_triton.SUM_BLOCK,
        num_warps=4,
        scalars=dict.fromkeys(names, "fp32"),
    )


def scale_case(kind: str) -> Case:
    """What comes after the loss in its gradient."""
    block = loss_triton.SCALE_BLOCK
    pointers, constants = {"values": kind, "scale": "fp32"}, {"PROGRAMS": 1024, "REPEATS": 3, "BLOCK": block}
    return Case(f"scale {kind}", loss_triton._scale_kernel, pointers, ("count",), constants, block, 4)


def fill_case(normal: bool) -> Case:
    """Plain random numbers."""
    kernel, block = philox_triton._fill_kernel, philox_triton.MAX_BLOCK
    constants = {"NORMAL": normal, "BLOCK": block}
    name = "normal" if normal else "uniform"
    return Case(name, kernel, {"seeds": "i64", "out": "fp32"}, ("count", "quarter"), constants, 4 * block, 4)


CASES = [noise_case(), noise_case(output="fp32"), noise_case(flip=True), noise_case("fp16", predict_v=True)]
CASES += [ddim_case(), ddim_case(guidance=2.0), ddim_case(noise=True), ddim_case("fp32", guidance=2.0, with_x0=True)]
SUMS = [loss_case(), loss_case("fp32", per_sample=True), sum_case(False), sum_case(True)]
SUMS += [loss_case(count=105), scale_case("bf16"), fill_case(True), fill_case(False)]
RAGGED = [ddim_case(count=105, noise=True, predict_v=True), ddim_case("fp16", count=1, guidance=2.0, with_x0=True)]
RAGGED += [
    noise_case(count=105),
    noise_case("fp32", "fp32", count=1, flip=True),
    noise_case("bf16", "fp16", count=4098),
]


def build(case: Case) -> Any:
    """The kernel compiled for sm_90; Triton's cache is its own business."""
    signature = {name: f"*{kind}" for name, kind in case.pointers.items()}
    signature |= dict.fromkeys(case.integers, "i32") | case.scalars | dict.fromkeys(case.constants, "constexpr")
    names = case.kernel.arg_names
    aligned = [*case.pointers, *(case.integers if case.divisible else ())]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, {name: signature[name] for name in names}, case.constants, attributes)
    return triton.compile(source, TARGET, {"num_warps": case.num_warps, "enable_fp_fusion": False})


def disassemble(cubin: bytes, tool: str, *options: str) -> str:
    """What a tool of the CUDA toolkit that comes with Triton prints about a cubin."""
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, *options, file.name], capture_output=True, text=True, check=True).stdout


def count(case: Case) -> dict[str, Any]:
    """One row of the table."""
    cubin = build(case).asm["cubin"]
    found = [name for name in INSTRUCTION.findall(disassemble(cubin, "nvdisasm", "-c")) if name != "NOP"]
    usage = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", disassemble(cubin, "cuobjdump", "-res-usage")))
    kinds = Counter(name.partition(".")[0] for name in found)
    return {
        "kernel": case.name,
        "instructions": len(found),
        "per_element": round(len(found) * 32 * case.num_warps / case.elements, 1),
        "registers": int(usage["REG"]),
        "stack": int(usage["STACK"]),
        "shared": int(usage["SHARED"]),
        "barriers": kinds["BAR"],
        "loads": dict(Counter(name for name in found if name.startswith("LDG"))),
        "stores": dict(Counter(name for name in found if name.startswith("STG"))),
        "kinds": dict(kinds.most_common()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="file for the counts")
    arguments = parser.parse_args()
    rows = [count(case) for case in CASES + SUMS]
    for row in rows:
        print(
            f"{row['kernel']:32} {row['per_element']:6.1f} instructions per element   {row['registers']:3} registers   "
            f"{row['shared']:5} B shared   loads {row['loads']}   stores {row['stores']}"
        )
    if arguments.json is not None:
        command = " ".join(["python", "benchmarks/sass.py", *sys.argv[1:]])
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        content = {"command": command, "target": "sm_90", "versions": versions, "rows": rows}
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
