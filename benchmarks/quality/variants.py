"""What is compared: data sets at the size that is measured, and the ways to replay."""

from __future__ import annotations

from dataclasses import dataclass

INLINE, DEFAULT = "inline", "default"
MAIN = (INLINE, DEFAULT, "on-path", "both")  # of the main table


@dataclass(frozen=True)
class DataSet:
    """A configuration and what differs from it here; `reduced` says what is smaller than in the papers."""

    config: str
    settings: tuple[str, ...]
    samples: int  # generated images in the final measure
    reduced: str = ""


@dataclass(frozen=True)
class Variant:
    """A way to replay, as settings over the defaults, and the question that it answers."""

    name: str
    question: str
    settings: tuple[str, ...]


# One thread for each process, as the runs go side by side; few samples, as the final model is measured again.
_ALL = (
    *("train.threads=1", "tracking.progress=false", "evaluation.samples=500"),
    *("ema.decay=0.98", "model.conditional=false"),
)
_SMALL = ("data.image_size=16", "model.channels=[32,64]", "model.attention_levels=[]", "model.norm_groups=8")
_SHORT = ("train.images_per_task=12800", "train.global_batch=64", "optimizer.lr=1e-3", "data.tasks=[[0,1],[2,3],[4,5]]")
_REDUCED = "16x16 pixels, 6 classes in 3 tasks, 200 steps of 64 + 64 a task, U-Net 32-64, Adam 1e-3, EMA 0.98"
DATA = {
    "digits": DataSet("digits.yaml", _ALL, 10_000),
    "fashion_mnist": DataSet("fashion_mnist.yaml", (*_ALL, *_SMALL, *_SHORT), 6_000, _REDUCED),
    "cifar10": DataSet("cifar10.yaml", (*_ALL, *_SMALL, *_SHORT), 6_000, _REDUCED),
}

VARIANTS = (
    Variant(INLINE, "the paper's: a trajectory in the loop for each point", ("replay.placement=inline",)),
    Variant(DEFAULT, "the pool as the defaults make it", ("replay.placement=subprocess",)),
    Variant("on-path", "points on the trajectory", ("replay.points=trajectory",)),
    Variant("both", "half of each kind", ("replay.points=both",)),
    Variant(
        "both-fixed",
        "the same timesteps on all paths",
        ("replay.points=both", "replay.jitter=false"),
    ),
    Variant("points-2", "fewer points of a trajectory", ("replay.points_per_trajectory=2",)),
    Variant("points-5", "fewer points of a trajectory", ("replay.points_per_trajectory=5",)),
    Variant("points-10", "fewer points of a trajectory", ("replay.points_per_trajectory=10",)),
    Variant("points-20", "fewer points of a trajectory", ("replay.points_per_trajectory=20",)),
    Variant("points-200", "more points of a trajectory", ("replay.points_per_trajectory=200",)),
    Variant("reuse-2", "each stored point twice", ("replay.reuse=2", "replay.points_per_trajectory=20")),
    Variant("reuse-5", "each stored point five times", ("replay.reuse=5", "replay.points_per_trajectory=20")),
    Variant("steps-5", "shorter trajectories", ("replay.steps=5",)),
    Variant("steps-20", "longer trajectories", ("replay.steps=20",)),
    Variant("steps-50", "longer trajectories", ("replay.steps=50",)),
    Variant("dpmpp", "a solver of second order", ("replay.solver=dpmpp",)),
    Variant("stratified", "timesteps spread over the schedule", ("replay.timesteps=stratified",)),
    Variant("eta-1", "trajectories as noisy as DDPM's", ("replay.eta=1",)),
    Variant("min-snr", "Min-SNR weights over the timesteps", ("method.min_snr=5",)),
    Variant("share", "tasks weigh as their classes (for tasks of unequal size)", ("method.share=classes",)),
    Variant("raw", "no EMA: student and teacher as they are", ("ema.decay=0",)),
    Variant("unclipped", "x_0 not clipped while sampling", ("replay.clip_sample=false",)),
)


def variant(name: str) -> Variant:
    """Raises KeyError."""
    return {known.name: known for known in VARIANTS}[name]
