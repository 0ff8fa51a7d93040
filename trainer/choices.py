"""What a key of the configuration may be, where that is one of a few words."""

from __future__ import annotations

from enum import Enum


class Source(str, Enum):
    """Where raw images come from; each has a module in data_tools/sources."""

    digits = "digits"
    idx = "idx"
    cifar10 = "cifar10"
    cifar100 = "cifar100"
    folder = "folder"
    npz = "npz"
    webdataset = "webdataset"
    imagenet = "imagenet"  # the official tars, as they are
    parquet = "parquet"  # as of Hugging Face


class SmallImages(str, Enum):
    """What becomes of raw images whose shorter side is below data.image_size."""

    pad = "pad"  # a black border
    enlarge = "enlarge"


class ShardFormat(str, Enum):
    png = "png"
    raw = "raw"


class Verify(str, Enum):
    sha256 = "sha256"
    size = "size"


class Schedule(str, Enum):
    linear = "linear"
    cosine = "cosine"


class Prediction(str, Enum):
    epsilon = "epsilon"
    v = "v"


class Precision(str, Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OptimizerName(str, Enum):
    adam = "adam"
    adamw = "adamw"


class MethodName(str, Enum):
    finetune = "finetune"
    joint = "joint"
    experience_replay = "experience_replay"
    generative_replay = "generative_replay"
    generative_distillation = "generative_distillation"
    lwf = "lwf"
    gaussian_distillation = "gaussian_distillation"
    partial_generation = "partial_generation"
    l2 = "l2"
    ewc = "ewc"
    rank1_ewc = "rank1_ewc"
    jdcl = "jdcl"


class PenaltyName(str, Enum):
    """What holds the weights near those of earlier tasks; the names of methods that are such a penalty alone."""

    none = "none"
    l2 = "l2"
    ewc = "ewc"
    rank1_ewc = "rank1_ewc"


class Buffer(str, Enum):
    """How experience_replay chooses the real images that it keeps."""

    class_balanced = "class_balanced"
    reservoir = "reservoir"


class Placement(str, Enum):
    inline = "inline"
    subprocess = "subprocess"
    ranks = "ranks"
    external = "external"


class Points(str, Enum):
    renoised = "renoised"
    trajectory = "trajectory"
    both = "both"

    def on_path(self, count: int) -> int:
        """How many of a trajectory's `count` points lie on its path: its first ones. The others are re-noised."""
        return {Points.renoised: 0, Points.both: (count + 1) // 2, Points.trajectory: count}[self]


class OwnPoints(str, Enum):
    """Replay points that come with a method; they are no choice of `replay.points`."""

    noise = "noise"  # gaussian_distillation: pure noise
    current = "current"  # lwf: the current task's noisy images
    labelled = "labelled"  # jdcl: re-noised images of two teachers, which have told their classes


class Timesteps(str, Enum):
    uniform = "uniform"
    stratified = "stratified"


class Share(str, Enum):
    tasks = "tasks"
    classes = "classes"


class OwnClassifier(str, Enum):
    """The classifier that is a part of the model and learns with it."""

    none = "none"
    joint = "joint"  # on the features of the U-Net's encoder
    separate = "separate"  # on those of an encoder of its own, which shares nothing


class Solver(str, Enum):
    ddim = "ddim"
    dpmpp = "dpmpp"  # DPM-Solver++(2M)


class LocalStart(str, Enum):
    """From where the local stage of jdcl sets out."""

    scratch = "scratch"  # fresh weights
    previous = "previous"  # the model of the tasks before


class Missing(str, Enum):
    """What stands in for images of a class that a teacher of jdcl does not make."""

    repeat = "repeat"  # those that it made of the class, once more; images of other classes where there is none
    other = "other"  # images of other classes
    fail = "fail"  # nothing: the run ends


class OnStarved(str, Enum):
    wait = "wait"
    reuse = "reuse"
    real_only = "real_only"
    fail = "fail"


class Retirement(str, Enum):
    delete = "delete"
    keep = "keep"


class Extractor(str, Enum):
    classifier = "classifier"
    inception = "inception"
    dinov2 = "dinov2"


class Wandb(str, Enum):
    off = "off"
    offline = "offline"
    online = "online"
