"""Settings of the probes of a model's features: what `trainer.settings.check` asks of them."""

from __future__ import annotations

from itertools import pairwise

from trainer.config import Config
from trainer.errors import ConfigError


def check_probes(config: Config, tasks: list[list[int]]) -> None:
    """Refuse probes that cannot learn; `tasks` are the class ids of each task.

    Raises:
        ConfigError: one line naming the key.
    """
    chosen, count = config.evaluation, config.evaluation.probe_images
    if not count:
        return
    if config.model.conditional:
        raise ConfigError(
            f"evaluation.probe_images={count}: the features of a model with model.conditional=true depend on the class "
            "that they shall tell; take model.conditional=false"
        )
    levels, timesteps = chosen.probe_timesteps, config.diffusion.timesteps
    if not levels or any(low >= high for low, high in pairwise([-1, *levels, timesteps])):
        raise ConfigError(
            f"evaluation.probe_timesteps={levels}: must be timesteps from low to high, 0 to {timesteps - 1} "
            f"(diffusion.timesteps={timesteps})"
        )
    images = count * len(tasks[0])
    if chosen.probe_neighbours > images:
        raise ConfigError(
            f"evaluation.probe_neighbours={chosen.probe_neighbours}: more than the {images} images that the first "
            f"task's probes learn from (evaluation.probe_images={count})"
        )
