"""Times the kernels: image -> (x_t, target), the DDIM step, the weighted loss with its gradient.

    python benchmarks/kernels.py --json benchmarks/results/kernels.json [--tune]

Each stands beside its PyTorch reference in eager mode and under torch.compile, in rounds that take turns, on inputs
that take turns too, so that no cache serves them; a copy of as many bytes is timed in the same rounds. Before anything
is timed, all are held against float64 on fresh random inputs. Without CUDA the references are checked and timed at
small sizes, and the claims stay open. `--tune` times other program sizes, too. `benchmarks/sass.py` counts the
instructions.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from claims import NEEDS_CUDA, Claim, Report, Timing, WrongResult, command_line, fail, side_by_side
from torch import Tensor

from trainer.config import DiffusionConfig
from trainer.diffusion.schedules import make_schedule
from trainer.kernels.ddim import ddim_update, ddim_update_reference
from trainer.kernels.dispatch import triton_module
from trainer.kernels.launch import Blocks
from trainer.kernels.loss import weighted_squared_error
from trainer.kernels.noise import add_noise, add_noise_reference
from trainer.kernels.philox import normal_reference

CHECKED = 8  # of the first and of the last samples are held against float64
SETS = 3  # of inputs that take turns
WEIGHTS = (0.25, 0.75)
MAIN_TASK = "noise kernel, uint8 -> bf16"
SHAPES = {"cuda": (8192, 3, 64, 64), "cpu": (128, 3, 32, 32), "quick": (6, 3, 16, 16)}
HALF = 1.01 * 2.0**-8  # half a unit in the last place of bfloat16, relative, and what fp32 adds to it
Call = Callable[..., Any]


@dataclass(frozen=True)
class Task:
    """Something that is done in several ways: to new inputs, by calls that take them all.

    `check` gives the largest error of a call's results in units of what is allowed, against float64.
    """

    name: str
    eager: Call
    ours: Call
    inputs: Callable[[int, torch.device], dict[str, Any]]
    check: Callable[[dict[str, Any], Any], float]
    bytes_per_element: int
    tunable: Callable[[Blocks], Call] | None = None


# --- the tasks --------------------------------------------------------------------------------------------------


def noise_task(shape: Sequence[int], *, bf16: bool) -> Task:
    """uint8 images -> x_t and eps."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    schedule = make_schedule(DiffusionConfig())
    options: dict[str, Any] = {"flip": None, "predict_v": False, "dtype": dtype}

    def inputs(batch: int, device: torch.device) -> dict[str, Any]:
        return {
            "images": torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=device),
            "seeds": torch.randint(-(2**62), 2**62, (batch,), device=device),
            "t": torch.randint(0, schedule.timesteps, (batch,), device=device),
            "signal": schedule.signal.to(device),
            "sigma": schedule.sigma.to(device),
        }

    def check(given: dict[str, Any], found: tuple[Tensor, Tensor]) -> float:
        images, seeds, t = (ends(given[name]) for name in ("images", "seeds", "t"))
        noise = normal_reference(seeds, tuple(images.shape[1:])).double()
        signal, sigma = (given[name].cpu().double()[t][:, None, None, None] for name in ("signal", "sigma"))
        x = signal * (images.double() / 127.5 - 1) + sigma * noise
        return max(excess(part, expected, dtype) for part, expected in zip(found, (x, noise), strict=True))

    def tunable(blocks: Blocks) -> Call:
        return lambda **given: kernels("noise").add_noise(**given, **options, blocks=blocks)

    return Task(
        MAIN_TASK if bf16 else "noise kernel, uint8 -> fp32",
        lambda **given: add_noise_reference(**given, **options),
        lambda **given: add_noise(**given, **options),
        inputs,
        check,
        1 + 2 * dtype.itemsize,
        tunable,
    )


def ddim_task(shape: Sequence[int], name: str, *, guidance: float = 1.0, noisy: bool = False) -> Task:
    """One step from bf16 predictions of eps."""
    options: dict[str, Any] = {"predict_v": False, "clip": True, "guidance": guidance}

    def inputs(batch: int, device: torch.device) -> dict[str, Any]:
        x, prediction, null = (torch.randn(batch, *shape, device=device) for _ in range(3))
        signal, following = torch.rand(2, batch, device=device).mul_(0.9).add_(0.05).sort(dim=0).values
        rest = (1 - following.square()).sqrt()
        table = torch.stack([signal, (1 - signal.square()).sqrt(), following, 0.8 * rest, 0.6 * rest])
        return {
            "x": x,
            "prediction": prediction.to(torch.bfloat16),
            "coefficients": table,
            "null_prediction": null.to(torch.bfloat16) if guidance != 1.0 else None,
            "seeds": torch.randint(-(2**62), 2**62, (batch,), device=device) if noisy else None,
        }

    def check(given: dict[str, Any], found: tuple[Tensor, Tensor | None]) -> float:
        factors = ends(given["coefficients"].t()).double()
        signal, sigma, following, direction, spread = factors.t()[..., None, None, None]
        x, p = ends(given["x"]).double(), ends(given["prediction"]).double()
        if guidance != 1.0:
            p = (1 - guidance) * ends(given["null_prediction"]).double() + guidance * p
        x_next = following * ((x - sigma * p) / signal).clamp(-1, 1) + direction * p
        if noisy:
            x_next += spread * normal_reference(ends(given["seeds"]), tuple(x.shape[1:])).double()
        return excess(found[0], x_next, torch.float32, scale=(x.abs() + p.abs()) / signal)

    def tunable(blocks: Blocks) -> Call:
        return lambda **given: kernels("ddim").ddim_update(**given, **options, blocks=blocks)

    return Task(
        name,
        lambda **given: ddim_update_reference(**given, **options),
        lambda **given: ddim_update(**given, **options),
        inputs,
        check,
        4 + 2 * (1 if guidance == 1.0 else 2) + 4,
        tunable,
    )


def loss_task(shape: Sequence[int]) -> Task:
    """Loss of two parts, and the gradient for bf16 predictions."""

    def inputs(batch: int, device: torch.device) -> dict[str, Any]:
        values = [torch.randn(batch, *shape, device=device).to(torch.bfloat16) for _ in range(2)]
        first = batch // 3
        return {"prediction": values[0].requires_grad_(), "targets": values[1].split([first, batch - first])}

    def plain(prediction: Tensor, targets: Sequence[Tensor]) -> Tensor:
        parts = prediction.split([len(target) for target in targets])
        errors = [(part.float() - target.float()).square().mean() for part, target in zip(parts, targets, strict=True)]
        return WEIGHTS[0] * errors[0] + WEIGHTS[1] * errors[1]

    def ours(prediction: Tensor, targets: Sequence[Tensor]) -> Tensor:
        return weighted_squared_error(prediction, targets, WEIGHTS)[0]

    def check(given: dict[str, Any], found: tuple[Tensor, Tensor]) -> float:
        prediction, target = given["prediction"].detach().double(), torch.cat(given["targets"]).double()
        rows = [len(part) for part in given["targets"]]
        factors = [weight / (n * math.prod(shape)) for weight, n in zip(WEIGHTS, rows, strict=True)]
        factor = torch.tensor(factors, dtype=torch.float64).repeat_interleave(torch.tensor(rows))
        factor = factor.to(prediction.device)[:, None, None, None]
        difference = prediction - target
        loss, gradient = (factor * difference.square()).sum(), 2 * factor * difference
        wrong = float((found[0].double() - loss).abs() / loss) / 1e-5
        return max(wrong, excess(found[1], ends(gradient), torch.bfloat16, scale=0.0))

    return Task("loss with gradient, bf16", WithGradient(plain), WithGradient(ours), inputs, check, 3 * 2)


class WithGradient:
    """A loss and its gradient for the prediction; `of` is what torch.compile compiles."""

    def __init__(self, of: Call) -> None:
        self.of = of

    def __call__(self, prediction: Tensor, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        loss = self.of(prediction, targets)
        return loss.detach(), torch.autograd.grad(loss, prediction)[0]


def kernels(name: str) -> Any:
    module = triton_module(name)
    assert module is not None, "where there is CUDA"
    return module


def ends(value: Tensor) -> Tensor:
    """What is checked of a batch, on the CPU."""
    return torch.cat([value[:CHECKED], value[-CHECKED:]]).detach().cpu()


def excess(found: Tensor, expected: Tensor, dtype: torch.dtype, scale: Tensor | float = 1.0) -> float:
    """The largest error over what is allowed: 2e-6 of `scale`, and one rounding to `dtype`; `expected` is of `ends`."""
    error = (ends(found).double() - expected).abs()
    rounding = HALF if dtype == torch.bfloat16 else 2e-6
    smallest = torch.finfo(torch.float32).tiny
    ratio = error / (2e-6 * scale + rounding * expected.abs() + smallest)
    return math.inf if bool(ratio.isnan().any()) else float(ratio.max())


# --- measuring --------------------------------------------------------------------------------------------------


def compiled(call: Call) -> Call:
    """The same under torch.compile, with static shapes."""
    if isinstance(call, WithGradient):
        return WithGradient(torch.compile(call.of, dynamic=False))
    return torch.compile(call, dynamic=False)


def contenders(task: Task, cuda: bool) -> dict[str, Call]:
    if not cuda:
        return {"eager": task.eager, "ours": task.ours}
    return {"eager": task.eager, "compiled": compiled(task.eager), "ours": task.ours}


def check(task: Task, calls: dict[str, Call], given: dict[str, Any]) -> dict[str, float]:
    """The error of each call over what is allowed. Raises WrongResult where it is above 1."""
    errors = {name: task.check(given, call(**given)) for name, call in calls.items()}
    for name, error in errors.items():
        if not error <= 1.0:
            raise WrongResult(f"{task.name}, {name}: {error:.3g} times the error allowed against float64")
    return errors


def in_turn(call: Call, sets: Sequence[dict[str, Any]]) -> Callable[[], object]:
    """The call with another set of inputs each time."""
    numbers = count()
    return lambda: call(**sets[next(numbers) % len(sets)])


def copies(size: int, device: torch.device) -> Callable[[], object]:
    """Copies that read and write `size` bytes together, from and to places that take turns."""
    pairs = [torch.randint(0, 256, (2, max(1, size // 2)), dtype=torch.uint8, device=device) for _ in range(SETS)]
    return in_turn(lambda pair: pair[1].copy_(pair[0]), [{"pair": pair} for pair in pairs])


def race(task: Task, shape: Sequence[int], device: torch.device, rounds: int, tune: bool) -> dict[str, Any]:
    """Errors and times of a task, with a copy of as many bytes beside."""
    cuda = device.type == "cuda"
    sets = [task.inputs(shape[0], device) for _ in range(SETS if cuda else 1)]
    calls = contenders(task, cuda)
    if tune and cuda and task.tunable is not None:
        calls |= {f"{b.size}x{b.num_warps}": task.tunable(b) for b in other_blocks(math.prod(shape[1:]) // 4)}
    errors = check(task, calls, sets[0])
    size = task.bytes_per_element * math.prod(shape)
    running = {name: in_turn(call, sets) for name, call in calls.items()} | {"copy": copies(size, device)}
    times = side_by_side(running, device, rounds=rounds, calls=10 if cuda else 1)
    return {"task": task.name, "bytes": size, "elements": math.prod(shape), "errors": errors, "times": times}


def other_blocks(places: int) -> list[Blocks]:
    """Programs of other sizes that cover a sample's counters evenly."""
    sizes = [
        (size, warps) for size in (256, 512, 1024, 2048) for warps in (1, 2, 4, 8) if 2 <= size // (32 * warps) <= 16
    ]
    return [Blocks(size, places // size, True, warps) for size, warps in sizes if places % size == 0]


def rates(result: dict[str, Any], name: str, what: str) -> list[float]:
    """1e9 bytes or elements a second of each round; [] where there was no such contender."""
    times: Timing | None = result["times"].get(name)
    return [] if times is None else [result[what] / 1e9 / seconds for seconds in times.rounds]


def claims_of(result: dict[str, Any], cuda: bool) -> list[Claim]:
    """Every kernel is to beat torch.compile; the noise kernel, as the program uses it, has two bars more."""
    task, ours, unit = result["task"], rates(result, "ours", "elements"), "1e9 elements/s"
    missing = "" if cuda else NEEDS_CUDA

    def faster(bar: float, name: str, against: str) -> Claim:
        return Claim(task, unit, bar, ours, rates(result, name, "elements"), against=against, missing=missing)

    made = [faster(1.0, "compiled", "torch.compile")]
    if task == MAIN_TASK:
        gigabytes = rates(result, "ours", "bytes"), rates(result, "copy", "bytes")
        share = Claim(
            f"{task}, share of the copy's bandwidth", "GB/s", 0.75, *gigabytes, against="a copy on the device"
        )
        made = [share, faster(12.0, "eager", "eager PyTorch"), *made]
    return made


def details(result: dict[str, Any]) -> dict[str, Any]:
    """What a result file keeps beside the claims."""
    copy = statistics.median(rates(result, "copy", "bytes"))
    contenders = {
        name: {
            "median_ms": statistics.median(times.rounds) * 1e3,
            "quartiles_ms": [value * 1e3 for value in statistics.quantiles(times.rounds, n=4)[::2]],
            "share_of_copy": result["bytes"] / 1e9 / statistics.median(times.rounds) / copy,
            "error_over_allowed": result["errors"].get(name),
        }
        for name, times in result["times"].items()
    }
    return {"task": result["task"], "bytes": result["bytes"], "contenders": contenders}


def show(found: dict[str, Any]) -> None:
    print(found["task"])
    for name, row in found["contenders"].items():
        error = row["error_over_allowed"]
        judged = "" if error is None else f"   error {error:.2f} of what is allowed"
        print(f"  {name:10} {row['median_ms']:9.3f} ms   {row['share_of_copy']:6.2f} of copy{judged}")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, default=None, help="file for the results")
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds")
    parser.add_argument("--tune", action="store_true", help="also time other sizes of programs")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES["quick" if options.quick else device.type]
    torch.seed()
    report = Report(command_line("kernels.py", arguments), options.json, device.type == "cuda")
    tasks = [noise_task(shape[1:], bf16=True), noise_task(shape[1:], bf16=False)]
    tasks += [ddim_task(shape[1:], "DDIM step"), ddim_task(shape[1:], "DDIM step, guided", guidance=2.0)]
    tasks += [ddim_task(shape[1:], "DDIM step, guided, eta > 0", guidance=2.0, noisy=True), loss_task(shape[1:])]
    found: list[dict[str, Any]] = []
    report.details = {"shape": list(shape), "tasks": found}
    for task in tasks:
        try:
            result = race(task, shape, device, 3 if options.quick else options.rounds, options.tune)
        except WrongResult as error:
            fail(error)
        found.append(details(result))
        show(found[-1])
        report.add(*claims_of(result, report.cuda))
        report.write()
    return report.conclude()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
