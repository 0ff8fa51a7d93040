"""What people use: diffusers' unconditional training loop, and its DDIM loop, as its examples write them."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from speed.reference import LOSS_ERROR, PART, compare, denoising_loss, exact
from speed.sizes import Sizes, make_config, random_images
from speed.turns import Turns
from trainer.steps import fresh_model

BATCHES = 4  # of images, in turn


def make_unet(sizes: Sizes, directory: Path) -> UNet2DModel:
    """The U-Net that is compared, in fp32: the same initial weights wherever it is made."""
    return fresh_model(make_config(sizes, directory, "peer")).unet


def move(
    unet: Any,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> UNet2DModel:
    """The U-Net itself, on the device."""
    unet.to(device=device, dtype=dtype, memory_format=memory_format)
    return unet


class DiffusersTraining:
    """examples/unconditional_image_generation/train_unconditional.py with class labels, on images that are on the
    device already and without `loss.item()` after each step, which would wait for the device."""

    def __init__(
        self,
        unet: UNet2DModel,
        images: Tensor,
        labels: Tensor,
        *,
        batch: int,
        autocast: bool,
        compiled: bool = False,
        channels_last: bool = False,
        lr: float = 1e-4,
    ) -> None:
        """Args: images: (N, C, H, W) in [-1, 1]; labels (N,); N a multiple of `batch`. `autocast`: to bf16."""
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.unet = move(unet, images.device, memory_format=memory_format)
        self.model = torch.compile(self.unet) if compiled else self.unet
        self.batches = list(zip(images.to(memory_format=memory_format).split(batch), labels.split(batch), strict=True))
        self.autocast = autocast
        self.scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
        weights = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
        self.lr_scheduler = get_scheduler(
            "cosine", optimizer=self.optimizer, num_warmup_steps=0, num_training_steps=100_000
        )
        self.ema = EMAModel(self.unet.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self.steps = 0

    def step(self) -> tuple[Tensor, Tensor]:
        """One step; its loss, and the gradient's norm before clipping."""
        clean, label = self.batches[self.steps % len(self.batches)]
        self.steps += 1
        noise = torch.randn_like(clean)
        t = torch.randint(0, self.scheduler.config["num_train_timesteps"], (len(clean),), device=clean.device).long()
        loss = self.loss(clean, noise, t, label)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        return loss.detach(), norm

    def loss(self, clean: Tensor, noise: Tensor, t: Tensor, label: Tensor, *, eager: bool = False) -> Tensor:
        """The denoising loss on clean images (B, C, H, W)."""
        noisy = self.scheduler.add_noise(clean, noise, t)  # pyright: ignore[reportArgumentType]
        with torch.autocast(clean.device.type, torch.bfloat16) if self.autocast else nullcontext():
            prediction = (self.unet if eager else self.model)(noisy, t, class_labels=label).sample
        return F.mse_loss(prediction.float(), noise.float())


def diffusers_training(
    turns: Turns, *, sizes: Sizes, directory: Path, seed: int, compiled: bool, channels_last: bool
) -> None:
    """A contender."""
    torch.manual_seed(seed)
    images, labels = random_images(sizes, BATCHES * sizes.batch, turns.device)
    unet, autocast = make_unet(sizes, directory), sizes.precision == "bf16"
    training = DiffusersTraining(
        unet, images, labels, batch=sizes.batch, autocast=autocast, compiled=compiled, channels_last=channels_last
    )
    turns.facts["error"] = check_training(training, make_unet(sizes, directory), sizes.precision)
    turns.start()
    while True:
        turns.note(*training.step())
        turns.step_done()


@torch.no_grad()
def check_training(training: DiffusersTraining, unet: UNet2DModel, precision: str) -> float:
    """The relative error of a loss on fresh noise. Raises WrongResult where it is more than rounding."""
    clean, label = (values[:PART] for values in training.batches[0])
    noise, t = torch.randn_like(clean), torch.randint(0, 1000, (len(clean),), device=clean.device)
    expected = denoising_loss(move(unet, clean.device, exact(clean.device)), clean, noise, t, label)
    found = training.loss(clean, noise, t, label, eager=True).item()
    return compare("the loss of diffusers' loop", [found], [expected], LOSS_ERROR[precision])


class DiffusersSampling:
    """The loop of DDIMPipeline with class labels; the weights in the type to sample in."""

    def __init__(
        self, unet: UNet2DModel, device: torch.device, dtype: torch.dtype, *, compiled: bool, channels_last: bool
    ) -> None:
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.unet = move(unet, device, dtype, memory_format=memory_format).eval()
        self.model = torch.compile(self.unet) if compiled else self.unet
        self.memory_format = memory_format
        self.scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", timestep_spacing="trailing")

    @torch.no_grad()
    def sample(self, start: Tensor, label: Tensor, steps: int) -> Tensor:
        """Images from start noise (B, C, H, W)."""
        self.scheduler.set_timesteps(steps)
        x = start.to(self.unet.dtype, memory_format=self.memory_format)
        for t in self.scheduler.timesteps:  # on the CPU, as in the pipeline: nothing waits for the device
            prediction = self.model(x, t, class_labels=label).sample
            x = self.scheduler.step(prediction, t, x, eta=0.0).prev_sample  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        return x


def diffusers_sampling(
    turns: Turns, *, sizes: Sizes, directory: Path, seed: int, steps: int, compiled: bool, channels_last: bool
) -> None:
    """A contender: each of its steps samples one batch, `steps` evaluations an image."""
    torch.manual_seed(seed)
    dtype = torch.bfloat16 if sizes.precision == "bf16" else torch.float32
    unet = make_unet(sizes, directory)
    sampling = DiffusersSampling(unet, turns.device, dtype, compiled=compiled, channels_last=channels_last)
    shape = (sizes.sampler_batch, 3, sizes.image_size, sizes.image_size)
    label = torch.arange(sizes.sampler_batch, device=turns.device) % sizes.classes
    turns.facts["evaluations"] = steps * sizes.sampler_batch
    turns.start()
    while True:
        sampling.sample(torch.randn(shape, device=turns.device), label, steps)
        turns.step_done()
