"""The denoiser: a diffusers U-Net behind the one signature that all of the project calls."""

from __future__ import annotations

from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from trainer.config import ModelConfig
from trainer.errors import ConfigError

UNET_PREFIX = "unet."


class Denoiser(nn.Module):
    """`forward(x_t, t, label) -> prediction` around `unet`; its weights are named `unet.<diffusers' name>`."""

    def __init__(self, unet: UNet2DModel, null_label: int | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.conditional = unet.class_embedding is not None
        self.null_label = null_label  # stands for no class; None where it was not learnt

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """Predict eps or v, as trained.

        Args:
            x: (B, C, H, W), any floating type; computed in the type of the weights.
            t: int64 (B,).
            label: int64 (B,), class ids below max_classes or `null_label`; ignored by an unconditional model.

        Returns:
            (B, C, H, W).
        """
        x = x.to(self.unet.conv_in.weight.dtype)
        return self.unet(x, t, class_labels=label if self.conditional else None, return_dict=False)[0]

    def blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all of the weights, in the order of computation."""
        middle = [self.unet.mid_block] if self.unet.mid_block is not None else []
        return [*self.unet.down_blocks, *middle, *self.unet.up_blocks]


def build_denoiser(model: ModelConfig, *, image_size: int, channels: int, max_classes: int) -> Denoiser:
    """A freshly initialised U-Net (Ho et al. 2020; diffusers' UNet2DModel) in fp32, weights from torch's generator.

    With an empty `attention_levels` there is no attention at all; otherwise also between the two halves.

    Raises:
        ConfigError: a size that the U-Net cannot have, naming the key.
    """
    check_model(model, image_size=image_size, max_classes=max_classes)
    null_label = max_classes if model.conditional and model.label_dropout > 0 else None
    levels = range(len(model.channels))
    attention = set(model.attention_levels)
    unet = UNet2DModel(
        sample_size=image_size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(model.channels),
        layers_per_block=model.layers_per_block,
        down_block_types=tuple("AttnDownBlock2D" if level in attention else "DownBlock2D" for level in levels),
        up_block_types=tuple("AttnUpBlock2D" if level in attention else "UpBlock2D" for level in reversed(levels)),
        add_attention=bool(attention),
        attention_head_dim=model.attention_head_dim,
        norm_num_groups=model.norm_groups,
        dropout=model.dropout,
        num_class_embeds=max_classes + (null_label is not None) if model.conditional else None,
    )
    return Denoiser(unet, null_label)


def check_model(model: ModelConfig, *, image_size: int, max_classes: int) -> None:
    """Whether a U-Net of this config can be built; see `build_denoiser`."""
    for key in ("layers_per_block", "attention_head_dim", "norm_groups"):
        if getattr(model, key) < 1:
            raise ConfigError(f"model.{key}: {getattr(model, key)}, must be at least 1")
    if not 0.0 <= model.dropout < 1.0:
        raise ConfigError(f"model.dropout: {model.dropout}, must be at least 0 and below 1")
    if not 0.0 <= model.label_dropout < 1.0:
        raise ConfigError(f"model.label_dropout: {model.label_dropout}, must be at least 0 and below 1")
    if model.conditional and max_classes < 1:
        raise ConfigError(f"model.max_classes: {max_classes}, a conditional model needs at least 1")
    _check_channels(model)
    factor = 2 ** (len(model.channels) - 1)
    if image_size < 1 or image_size % factor:
        raise ConfigError(
            f"model.channels: {len(model.channels)} levels halve the image {len(model.channels) - 1} times, "
            f"so data.image_size: {image_size} must be divisible by {factor}"
        )


def _check_channels(model: ModelConfig) -> None:
    if not model.channels:
        raise ConfigError("model.channels: empty, give the channels of each level")
    for channels in model.channels:
        if channels < 1 or channels % model.norm_groups:
            raise ConfigError(f"model.channels: {channels} is not divisible by model.norm_groups: {model.norm_groups}")
    for level in model.attention_levels:
        if not 0 <= level < len(model.channels):
            raise ConfigError(f"model.attention_levels: {level}, levels are 0 to {len(model.channels) - 1}")
    attended = {*model.attention_levels, len(model.channels) - 1} if model.attention_levels else set()
    for channels in (model.channels[level] for level in sorted(attended)):
        if channels % model.attention_head_dim:
            raise ConfigError(
                f"model.channels: {channels}, where there is attention, is not divisible by "
                f"model.attention_head_dim: {model.attention_head_dim}"
            )
