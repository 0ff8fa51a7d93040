"""One CPU thread for every test: sums, and so bits, depend on how many threads share them."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for every process that a test starts

import torch

torch.set_num_threads(1)
