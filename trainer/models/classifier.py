"""A classifier on what the encoder of a U-Net makes of an image (Skiers and Deja 2025, arXiv 2411.08224, section 3).

Every feature map of the encoder, the first convolution's to the middle block's, is averaged over its positions; the
averages side by side are the features of the image. So the weights that denoise are the weights that classify.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky rectifier below zero


@dataclass(frozen=True)
class Encoded:
    """Half-way through a U-Net: the middle block's output, the maps that the decoder takes over (the first
    convolution's first) and the embedding of the timesteps, each with a row for each image."""

    middle: Tensor
    skips: tuple[Tensor, ...]
    embedding: Tensor

    def rows(self, rows: slice) -> Encoded:
        """Some of the images."""
        return Encoded(self.middle[rows], tuple(skip[rows] for skip in self.skips), self.embedding[rows])

    @property
    def features(self) -> Tensor:
        """(B, `feature_width`)."""
        return torch.cat([plane.mean(dim=(2, 3)) for plane in (*self.skips, self.middle)], dim=1)


def encode(unet: UNet2DModel, x: Tensor, t: Tensor, label: Tensor | None = None) -> Encoded:
    """The first half of `UNet2DModel.forward`: x (B, C, H, W), t and label int64 (B,)."""
    embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    if unet.class_embedding is not None:
        embedding = embedding + unet.class_embedding(label).to(x.dtype)
    x = unet.conv_in(x)
    skips: tuple[Tensor, ...] = (x,)
    for block in unet.down_blocks:
        x, outputs = block(x, embedding)
        skips += tuple(outputs)
    if unet.mid_block is not None:
        x = unet.mid_block(x, embedding)
    return Encoded(x, skips, embedding)


def decode(unet: UNet2DModel, encoded: Encoded) -> Tensor:
    """The second half: (B, C, H, W)."""
    x, skips = encoded.middle, encoded.skips
    for block in unet.up_blocks:
        count = len(block.resnets)  # pyright: ignore[reportArgumentType]
        x, skips = block(x, skips[-count:], encoded.embedding), skips[:-count]
    return unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))


def feature_width(channels: Sequence[int], layers_per_block: int) -> int:
    """Features of an image: the channels of all maps of the encoder; each level but the last ends in a smaller map."""
    maps = [width for width in channels for _ in range(layers_per_block)]
    return channels[0] + sum(maps) + sum(channels[:-1]) + channels[-1]


def build_head(features: int, width: int, dropout: float, outputs: int) -> nn.Sequential:
    """features -> `width` -> one output for each class that there is room for."""
    return nn.Sequential(
        nn.Linear(features, width), nn.LeakyReLU(SLOPE), nn.Dropout(dropout), nn.Linear(width, outputs)
    )


def encoder_only(unet: UNet2DModel) -> UNet2DModel:
    """A U-Net without its second half."""
    del unet.up_blocks, unet.conv_norm_out, unet.conv_act, unet.conv_out
    return unet
