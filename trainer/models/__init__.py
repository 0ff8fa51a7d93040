"""The denoiser, the frozen teacher on disk, and its export as a diffusers pipeline."""
