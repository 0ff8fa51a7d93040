"""Class-conditional DDIM sampling for a diffusers UNet2DModel. Needs torch and diffusers only.

pipeline = DiffusionPipeline.from_pretrained(directory, custom_pipeline=directory, trust_remote_code=True)
images = pipeline(class_labels=[0, 1, 2], num_inference_steps=50).images
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.utils.torch_utils import randn_tensor


class ClassConditionalDDIMPipeline(DiffusionPipeline):
    """Samples one image for each class label; classes.json beside it names them."""

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: DDIMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int] | torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        eta: float = 0.0,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        null_class: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample by DDIM (Song et al. 2021).

        Args:
            class_labels: class ids, one per image.
            generator: of the start noise, and of the later noise where eta > 0.
            latents: start noise (B, C, H, W) instead.
            eta: 0 deterministic, 1 as noisy as DDPM.
            num_inference_steps: model evaluations; twice as many with guidance.
            guidance_scale: s in (1 - s) eps_null + s eps_class (Ho and Salimans 2022, arXiv 2207.12598); 1: none.
            null_class: the id that stands for no class, which classes.json names where the model learnt it; needed
                with guidance.
            output_type: "pil"; "np" for (B, H, W, C) in [0, 1]; "pt" for the raw tensor (B, C, H, W) in [-1, 1].
            return_dict: an ImagePipelineOutput instead of a tuple.
        """
        if guidance_scale != 1.0 and null_class is None:
            raise ValueError("guidance_scale needs null_class: classes.json names it where the model learnt one")
        device, dtype = self._execution_device, self.unet.dtype
        labels = torch.as_tensor(class_labels, dtype=torch.int64, device=device)
        size = self.unet.config.sample_size
        shape = (len(labels), self.unet.config.in_channels, size, size)
        x = randn_tensor(shape, generator=generator, device=device, dtype=dtype) if latents is None else latents
        x = x.to(device=device, dtype=dtype)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for t in self.progress_bar(self.scheduler.timesteps):  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            prediction = self.unet(x, t, class_labels=labels).sample
            if guidance_scale != 1.0 and null_class is not None:
                null = self.unet(x, t, class_labels=torch.full_like(labels, null_class)).sample
                prediction = (1.0 - guidance_scale) * null + guidance_scale * prediction
            x = self.scheduler.step(prediction, t, x, eta=eta, generator=generator).prev_sample
        images: Any = x if output_type == "pt" else self._to_images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _to_images(self, x: torch.Tensor, output_type: str) -> Any:
        array = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()
        return self.numpy_to_pil(array) if output_type == "pil" else array
