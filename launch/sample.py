"""Write images of a trained run.

python launch/sample.py --run runs/first --count 64 --out samples
"""

from __future__ import annotations

from pathlib import Path

from trainer.cli import Parser, positive, run_main
from trainer.config import Solver
from trainer.sampling import Request, sample


def class_ids(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def main(argv: list[str]) -> int:
    parser = Parser(description="Write images of a trained run as PNG files and a grid.", allow_abbrev=False)
    parser.add_argument("--run", type=Path, required=True, metavar="DIR", help="the run directory")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the images go")
    parser.add_argument("--task", type=positive, default=0, help="the model after this task; default: the newest")
    parser.add_argument("--classes", type=class_ids, default=(), metavar="0,1,...", help="default: all classes learnt")
    parser.add_argument("--count", type=positive, default=64, help="number of images, the classes in turn")
    parser.add_argument("--steps", type=positive, default=50, help="sampling steps")
    parser.add_argument("--solver", choices=[solver.value for solver in Solver], default="ddim")
    parser.add_argument("--guidance", type=float, default=1.0, help="by the class; 1: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1, ...; default: a GPU where there is one")
    options = vars(parser.parse_args(argv))
    options["solver"] = Solver(options["solver"])
    paths = sample(Request(**options))
    print(f"{len(paths) - 1} images and {paths[-1]}")
    return 0


if __name__ == "__main__":
    run_main(main)
