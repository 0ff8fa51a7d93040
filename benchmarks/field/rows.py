"""What is trained to look again at the field's findings: rows, and the questions that they answer."""

from __future__ import annotations

from dataclasses import dataclass, replace

from quality.variants import DATA as OF_REPLAY
from quality.variants import DataSet

FINETUNE, JOINT = "finetune", "joint"
GD, GR = "generative_distillation", "generative_replay"
COEFFICIENTS = ("1", "0.5", "0.2")  # of rehearsal, over the same small buffer
PENALTIES = (("rank1_ewc", "15000"), ("rank1_ewc", "10"), ("ewc", "10"))  # and their weights; 15,000 is the paper's

JDCL, SEPARATE, UNDISTILLED = "jdcl", "jdcl-separate", "jdcl-not-distilled"
FINETUNE_BOTH, JOINT_BOTH = "finetune-classifier", "joint-classifier"  # with a classifier within the model
# Weights of the classifier's terms for a few hundred steps; the paper's are for tens of thousands. Nothing is
# distorted: at 8x8 pixels RandAugment leaves little of a digit.
_BOTH = (
    *("model.classifier=joint", "classifier.epochs=0", "jdcl.classification_weight=0.1"),
    *("jdcl.weak_crop=1", "jdcl.strong_operations=0"),
)
_TAUGHT = ("method.name=jdcl", "jdcl.label_weight=0.01", "jdcl.logit_weight=0.1")

# The evaluations after each task; the final model is measured again on more samples. Few timesteps of the bound are
# enough: what is compared are means over all images of a data set. A classifier learns the tasks from what is replayed.
EVALUATION = (
    *("evaluation.samples=2000", "evaluation.bpd_images=24", "evaluation.bpd_timesteps=50"),
    "classifier.epochs=10",
)

# Thirty runs want less of a data set than the few of replay's do: pixels rather than steps, as models that have learnt
# too little are all alike.
_FEWER = ("data.image_size=8", "train.images_per_task=16000", "classifier.epochs=2", "evaluation.samples=1000")
_FEWER_REPLAYED = "classifier.replay_images=2000"
_REDUCED = "8x8 pixels, 6 classes in 3 tasks, 250 steps of 64 + 64 a task, U-Net 32-64, Adam 1e-3, EMA 0.98"


def _fewer(data: DataSet) -> DataSet:
    return replace(data, settings=(*data.settings, *EVALUATION, *_FEWER), samples=5_000, reduced=_REDUCED)


DATA = {
    "digits": replace(OF_REPLAY["digits"], settings=(*OF_REPLAY["digits"].settings, *EVALUATION)),
    "fashion_mnist": _fewer(OF_REPLAY["fashion_mnist"]),
    "cifar10": _fewer(OF_REPLAY["cifar10"]),
}
SETTINGS = {
    FINETUNE: ("method.name=finetune",),
    JOINT: ("method.name=joint",),
    GD: ("method.name=generative_distillation",),
    GR: ("method.name=generative_replay",),
    **{
        f"{GD}+{penalty}-{weight}": (
            *("method.name=generative_distillation", f"method.penalty={penalty}", f"method.penalty_weight={weight}"),
            "method.fisher_images=50",
        )
        for penalty, weight in PENALTIES
    },
    JDCL: (*_BOTH, *_TAUGHT),
    SEPARATE: (*_BOTH, *_TAUGHT, "model.classifier=separate"),
    UNDISTILLED: (*_BOTH, "method.name=jdcl", "jdcl.distil=false"),
    FINETUNE_BOTH: (*_BOTH, "method.name=finetune"),
    JOINT_BOTH: (*_BOTH, "method.name=joint"),
    **{
        f"er-{coefficient}": (
            *("method.name=experience_replay", "method.buffer_per_class=2"),
            f"method.rehearsal_coefficient={coefficient}",
        )
        for coefficient in COEFFICIENTS
    },
}


def settings_of(row: str, data: str) -> tuple[str, ...]:
    """What a row sets beside its data set's settings."""
    replays = row.startswith((GD, GR)) and data != "digits"
    return (*SETTINGS[row], *((_FEWER_REPLAYED,) if replays else ()))


@dataclass(frozen=True)
class Question:
    """`rows` are trained for it; `source` found the answer that is looked at again."""

    name: str
    text: str
    rows: tuple[str, ...]
    source: str


QUESTIONS = {
    question.name: question
    for question in (
        Question(
            "order",
            "joint <= generative distillation < generative replay < finetune, in FD and KLD",
            (JOINT, GD, GR, FINETUNE),
            "Masip et al. 2024, arXiv 2311.14028",
        ),
        Question(
            "rehearsal",
            "of a small buffer: is it better to rehearse with a coefficient below 1?",
            tuple(f"er-{coefficient}" for coefficient in COEFFICIENTS),
            "Zajac et al. 2023, arXiv 2303.15342",
        ),
        Question(
            "timesteps",
            "at which timesteps is more forgotten?",
            (FINETUNE, GD, GR, JOINT),
            "Zajac et al. 2023, arXiv 2303.15342",
        ),
        Question(
            "likelihood",
            "do bits per dimension tell what was forgotten?",
            (JOINT, GD, GR, "er-1", FINETUNE),
            "Zajac et al. 2023, arXiv 2303.15342",
        ),
        Question(
            "penalty",
            "is distillation better with a hold on the weights beside it?",
            (GD, *(f"{GD}+{penalty}-{weight}" for penalty, weight in PENALTIES)),
            "Wang et al. 2026, arXiv 2509.23593",
        ),
        Question(
            "joint_models",
            "does a model that also classifies keep its classes, and what of jdcl does it need?",
            (JOINT_BOTH, JDCL, SEPARATE, UNDISTILLED, FINETUNE_BOTH),
            "Skiers and Deja 2025, arXiv 2411.08224",
        ),
    )
}
