"""What a model costs and what the card can do, for the share of the card that is used."""

from __future__ import annotations

import statistics

import torch
from claims import side_by_side
from torch.utils.flop_counter import FlopCounterMode

from trainer.config import Config
from trainer.models.denoiser import build_denoiser

EDGE = 8192  # of the square matrices
COPY_BYTES = 1 << 32


def forward_flops(config: Config) -> int:
    """Floating-point operations of one image's forward pass, two for each multiply-add; a training step's are three
    times as many."""
    data = config.data
    with torch.device("meta"):
        model = build_denoiser(
            config.model, image_size=data.image_size, channels=data.channels, max_classes=config.max_classes
        )
        x = torch.empty(1, data.channels, data.image_size, data.image_size)
        t = label = torch.zeros(1, dtype=torch.int64)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, label)
    return counter.get_total_flops()


def measure_card() -> dict[str, float]:
    """FLOP/s of a bf16 product on random matrices, bytes/s of a copy (read and written); medians."""
    device = torch.device("cuda", 0)
    a, b, product = (torch.randn(EDGE, EDGE, device=device, dtype=torch.bfloat16) for _ in range(3))
    source = torch.randint(0, 256, (COPY_BYTES,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls = {"product": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    times = side_by_side(calls, device, rounds=10, calls=10)
    return {
        "flops_per_second": 2 * EDGE**3 / statistics.median(times["product"].rounds),
        "copy_bytes_per_second": 2 * COPY_BYTES / statistics.median(times["copy"].rounds),
    }
