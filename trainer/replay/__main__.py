"""`python -m trainer.replay`: how supervisors start samplers, wherever the package is installed."""

from trainer.cli import run_main
from trainer.replay.command import sampler_main

if __name__ == "__main__":
    run_main(sampler_main)
