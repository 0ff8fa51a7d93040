"""The classifier of a joint model, beside its diffusers pipeline. Needs torch, diffusers and safetensors only.

from classifier import load_classifier  # this file, from the pipeline's directory

logits = load_classifier(directory)(images)  # (n, C, H, W) in [-1, 1] -> (n, classes); classes.json names them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from safetensors.torch import load_file
from torch import nn

WEIGHTS = "classifier.safetensors"
SLOPE = 0.2


class EncoderClassifier(nn.Module):
    """Logits of clean images: every feature map of a U-Net's first half at t = 0, averaged over its positions, through
    two linear layers (Skiers and Deja 2025, arXiv 2411.08224)."""

    def __init__(self, encoder: UNet2DModel, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, classes)."""
        unet = self.encoder
        zero = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        embedding = unet.time_embedding(unet.time_proj(zero).to(images.dtype))
        x = unet.conv_in(images)
        maps = [x]
        for block in unet.down_blocks:
            x, outputs = block(x, embedding)
            maps += outputs
        if unet.mid_block is not None:
            x = unet.mid_block(x, embedding)
        return self.head(torch.cat([plane.mean(dim=(2, 3)) for plane in (*maps, x)], dim=1))


def load_classifier(directory: str | Path) -> EncoderClassifier:
    """The classifier in a pipeline's directory, in evaluation mode."""
    weights = load_file(Path(directory) / WEIGHTS)
    encoder: Any = UNet2DModel.from_pretrained(str(directory), subfolder="unet")
    own = {name.removeprefix("encoder."): value for name, value in weights.items() if name.startswith("encoder.")}
    if own:  # a classifier that shares nothing with the denoiser
        encoder = UNet2DModel.from_config(encoder.config)
        encoder.load_state_dict(own, strict=False)
    layers: list[nn.Linear] = []
    for number in (0, 3):
        weight, bias = weights[f"head.{number}.weight"], weights[f"head.{number}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return EncoderClassifier(encoder, nn.Sequential(layers[0], nn.LeakyReLU(SLOPE), layers[1])).eval()
