"""A rank that trains a toy by DeepSpeed alone, for `tests.cluster.bare`: ZeRO-2, told to give up after 20 s."""

from __future__ import annotations

import argparse
import os
from datetime import timedelta
from pathlib import Path

import deepspeed
import torch


def main() -> None:
    """Train for ever; the first rank counts its steps in the file `steps`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int)
    parser.parse_args()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled first
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=20))
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
    optimizer = torch.optim.Adam(model.parameters())
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    steps = 0
    while True:
        engine.backward(engine(torch.randn(8, 64)).square().mean())
        engine.step()
        steps += 1
        if os.environ["RANK"] == "0":
            Path("steps").write_text(str(steps))


if __name__ == "__main__":
    main()
