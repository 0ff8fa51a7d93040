"""Palimpsest: train one diffusion model on a sequence of tasks without forgetting."""
