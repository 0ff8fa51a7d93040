"""The denoiser: a diffusers U-Net behind the one signature that all of the project calls; it may also classify."""

from __future__ import annotations

from typing import overload

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from trainer.config import ModelConfig, OwnClassifier
from trainer.errors import ConfigError
from trainer.models.classifier import build_head, decode, encode, encoder_only, feature_width

UNET_PREFIX = "unet."


class Denoiser(nn.Module):
    """`forward(x_t, t, label) -> prediction` around `unet`; its weights are named `unet.<diffusers' name>`.

    With a classifier there is also `head`, on the features of the U-Net's own encoder or of `encoder`.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        null_label: int | None = None,
        head: nn.Module | None = None,
        encoder: UNet2DModel | None = None,
    ) -> None:
        super().__init__()
        self.unet = unet
        self.conditional = unet.class_embedding is not None
        self.null_label = null_label  # stands for no class; None where it was not learnt
        self.head, self.encoder = head, encoder

    @overload
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, t: Tensor, label: Tensor | None, view: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(
        self, x: Tensor, t: Tensor, label: Tensor | None = None, view: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Predict eps or v, as trained; and classify other images in the same pass.

        Args:
            x: (B, C, H, W), any floating type; computed in the type of the weights.
            t: int64 (B,).
            label: int64 (B,), class ids below max_classes or `null_label`; ignored by an unconditional model.
            view: (N, C, H, W), clean images to classify; needs a classifier.

        Returns:
            (B, C, H, W); with `view` also the logits (N, max_classes).
        """
        x = self._typed(x)
        if view is None:
            return self._predict(x, t, label)
        if self.encoder is not None:
            return self._predict(x, t, label), self.classify(view)
        both = encode(self.unet, torch.cat([x, self._typed(view)]), torch.cat([t, t.new_zeros(len(view))]))
        return decode(self.unet, both.rows(slice(len(x)))), self._outputs(both.rows(slice(len(x), None)).features)

    def classify(self, view: Tensor) -> Tensor:
        """Logits (N, max_classes) of clean images (N, C, H, W): t = 0."""
        return self._outputs(self._features(self.encoder or self.unet, view, view.new_zeros(len(view)).long()))

    def features(self, x: Tensor, t: Tensor) -> Tensor:
        """What the encoder of an unconditional U-Net makes of noisy images, averaged over positions: (B, F)."""
        return self._features(self.unet, x, t)

    def blocks(self) -> list[nn.Module]:
        """The parts that hold nearly all of the weights, in the order of computation."""
        middle = [self.unet.mid_block] if self.unet.mid_block is not None else []
        own = [] if self.encoder is None else [*self.encoder.down_blocks, self.encoder.mid_block]
        return [*self.unet.down_blocks, *middle, *self.unet.up_blocks, *filter(None, own)]

    def _predict(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        return self.unet(x, t, class_labels=label if self.conditional else None, return_dict=False)[0]

    def _features(self, encoder: UNet2DModel, x: Tensor, t: Tensor) -> Tensor:
        return encode(encoder, self._typed(x), t).features

    def _outputs(self, features: Tensor) -> Tensor:
        assert self.head is not None, "a model with a classifier"
        return self.head(features)

    def _typed(self, x: Tensor) -> Tensor:
        return x.to(self.unet.conv_in.weight.dtype)


def build_denoiser(model: ModelConfig, *, image_size: int, channels: int, max_classes: int) -> Denoiser:
    """A freshly initialised U-Net (Ho et al. 2020; diffusers' UNet2DModel) in fp32, weights from torch's generator.

    With an empty `attention_levels` there is no attention at all; otherwise also between the two halves.

    Raises:
        ConfigError: a size that the U-Net cannot have, naming the key.
    """
    check_model(model, image_size=image_size, max_classes=max_classes)
    null_label = max_classes if model.conditional and model.label_dropout > 0 else None
    unet = _build_unet(model, image_size, channels, max_classes + (null_label is not None))
    if model.classifier is OwnClassifier.none:
        return Denoiser(unet, null_label)
    features = feature_width(model.channels, model.layers_per_block)
    head = build_head(features, model.classifier_width, model.classifier_dropout, max_classes)
    separate = model.classifier is OwnClassifier.separate
    return Denoiser(
        unet, null_label, head, encoder_only(_build_unet(model, image_size, channels, 0)) if separate else None
    )


def _build_unet(model: ModelConfig, image_size: int, channels: int, labels: int) -> UNet2DModel:
    levels = range(len(model.channels))
    attention = set(model.attention_levels)
    return UNet2DModel(
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
        resnet_time_scale_shift="scale_shift" if model.scale_shift else "default",
        num_class_embeds=labels if model.conditional else None,
    )


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
    _check_classifier(model, max_classes)
    _check_channels(model)
    factor = 2 ** (len(model.channels) - 1)
    if image_size < 1 or image_size % factor:
        raise ConfigError(
            f"model.channels: {len(model.channels)} levels halve the image {len(model.channels) - 1} times, "
            f"so data.image_size: {image_size} must be divisible by {factor}"
        )


def _check_classifier(model: ModelConfig, max_classes: int) -> None:
    kind = model.classifier
    if kind is OwnClassifier.none:
        return
    if model.conditional:
        raise ConfigError(f"model.classifier: {kind.value}, it would be told the class; take model.conditional: false")
    if max_classes < 1:
        raise ConfigError(f"model.max_classes: {max_classes}, a classifier needs at least 1")
    if model.classifier_width < 1:
        raise ConfigError(f"model.classifier_width: {model.classifier_width}, must be at least 1")
    if not 0.0 <= model.classifier_dropout < 1.0:
        raise ConfigError(f"model.classifier_dropout: {model.classifier_dropout}, must be at least 0 and below 1")


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
