"""Sample replay for a run, beside its trainer: `python launch/teacher.py --run runs/first --device cuda:1`.

For `replay.placement=external`: started by hand or by a cluster, on any machine that sees the run directory. The
sampler is a child that is started again when it dies or hangs. Opens no port; ends when the run is finished.
"""

from trainer.cli import run_main
from trainer.replay.command import main

if __name__ == "__main__":
    run_main(main)
