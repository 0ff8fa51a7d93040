"""Train a configuration: `deepspeed launch/train.py --config digits.yaml [section.key=value ...]`.

The same command again continues the run; a finished run prints its result.
"""

from __future__ import annotations

from trainer.cli import config_parser, run_main


def main(arguments: list[str]) -> int:
    """Parse the command line, check the configuration, train."""
    parser = config_parser("Train a diffusion model on a sequence of tasks.")
    parser.add_argument("--local_rank", type=int, default=0, help="set by the launcher")
    options = parser.parse_intermixed_args(arguments)

    from trainer.settings import load_config

    config = load_config(options.config, options.overrides)

    from trainer.session import train  # torch, diffusers and DeepSpeed: seconds, after the configuration is checked

    return train(config)


if __name__ == "__main__":
    run_main(main)
