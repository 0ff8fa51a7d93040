"""What the measured rows say to each question: columns of its table, and claims that hold, do not, or stay open."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, permutations
from typing import Any, Literal

from quality.paired import Interval

from field.outcome import Outcome, Outcomes, difference, final, numbers, ratio, spread
from field.rows import (
    COEFFICIENTS,
    FINETUNE,
    FINETUNE_BOTH,
    GD,
    JDCL,
    JOINT,
    JOINT_BOTH,
    QUESTIONS,
    SEPARATE,
    UNDISTILLED,
    Question,
    settings_of,
)

Read = Callable[[Outcome], float]


@dataclass(frozen=True)
class Answer:
    """A claim about a ratio (against 1) or a difference (against 0) of rows that share their seeds.

    It holds where the whole interval lies on the claimed side, does not where the whole lies on the other.
    """

    claim: str
    measured: Interval
    kind: Literal["ratio", "difference"]
    expected: Literal["below", "above"] = "below"

    @property
    def verdict(self) -> str:
        """yes, no or open."""
        low, high, level = self.measured.low, self.measured.high, 1.0 if self.kind == "ratio" else 0.0
        if low is None or high is None or low < level < high:
            return "open"
        return "yes" if (high <= level) == (self.expected == "below") else "no"

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict}


def result_final(key: str) -> Read:
    """A measure at the end of a run, from its own result."""
    return lambda outcome: float(outcome.result["final"][key])


MEASURES: dict[str, Read] = {
    **{key: final(key) for key in ("fd", "kld", "precision", "recall")},
    "classifier": result_final("classifier_accuracy"),
    "memorised": lambda outcome: outcome.memorised,
    "bpd": lambda outcome: statistics.fmean(outcome.bpd),
    "bpd_grown": lambda outcome: outcome.bpd_grown,
    **{key: result_final(key) for key in ("average_accuracy", "forgetting_model_accuracy", "backward_transfer")},
}
COLUMNS = {
    "order": ("fd", "kld", "precision", "recall", "classifier"),
    "rehearsal": ("fd", "kld", "precision", "recall", "memorised"),
    "timesteps": ("fd",),
    "likelihood": ("bpd", "bpd_grown", "fd", "kld"),
    "penalty": ("fd", "kld", "precision", "recall"),
    "joint_models": ("average_accuracy", "forgetting_model_accuracy", "backward_transfer", "fd", "kld"),
}


def rows_of(question: Question, outcomes: Outcomes, data: str) -> list[dict[str, Any]]:
    """The rows of a question's table, as they stand in a result file; those without a finished run are left out."""
    rows: list[dict[str, Any]] = []
    for name in question.rows:
        mine = outcomes.get(name)
        if not mine:
            continue
        values = {key: spread(numbers(mine, MEASURES[key])) for key in COLUMNS[question.name]}
        row: dict[str, Any] = {
            "row": name,
            "settings": [*settings_of(name, data)],
            "seeds": [*sorted(mine)],
            "values": values,
        }
        if question.name == "timesteps":
            row["loss_grown"] = _means([outcome.loss_grown for outcome in mine.values()])
            row["loss_forgotten"] = _means([outcome.loss_forgotten for outcome in mine.values()])
        rows.append(row)
    return rows


def answers_of(question: Question, outcomes: Outcomes) -> list[Answer]:
    """The claims that can be judged from what is finished."""
    return _ANSWERS[question.name](outcomes)


def _order(outcomes: Outcomes) -> list[Answer]:
    return [
        answer for better, worse in pairwise(QUESTIONS["order"].rows) for answer in _better(outcomes, better, worse)
    ]


def _rehearsal(outcomes: Outcomes) -> list[Answer]:
    whole, *reduced = (f"er-{coefficient}" for coefficient in COEFFICIENTS)
    found: list[Answer] = []
    for row in reduced:
        found += _better(outcomes, row, whole)
        found += _less(outcomes, row, whole, "memorised", "difference")
    return found


def _timesteps(outcomes: Outcomes) -> list[Answer]:
    """The least noisy bin, and the noisier half of them, against the rest of the less noisy half."""
    found: list[Answer] = []
    for row in (name for name in QUESTIONS["timesteps"].rows if name in outcomes and name != JOINT):
        middle = numbers(outcomes[row], lambda outcome: _mean_grown(outcome, 1, _half(outcome)))
        first = numbers(outcomes[row], lambda outcome: outcome.loss_grown[0])
        last = numbers(outcomes[row], lambda outcome: _mean_grown(outcome, _half(outcome), None))
        claim = f"{row}: the loss of earlier tasks grows less at"
        found += [
            Answer(f"{claim} the least noisy timesteps than up to the middle", ratio(first, middle), "ratio"),
            Answer(f"{claim} the noisier half than below it", ratio(last, middle), "ratio"),
        ]
    return found


def _half(outcome: Outcome) -> int:
    return (len(outcome.loss_grown) + 1) // 2


def _mean_grown(outcome: Outcome, begin: int, end: int | None) -> float:
    return statistics.geometric_mean(outcome.loss_grown[begin:end])


def _likelihood(outcomes: Outcomes) -> list[Answer]:
    """Pairs of rows of which the one with the better bits per dimension has the worse FD; both beyond doubt."""
    found = _likelihood_of_finetuning(outcomes[FINETUNE]) if FINETUNE in outcomes else []
    rows = [row for row in QUESTIONS["likelihood"].rows if row in outcomes]
    for likelier, other in permutations(rows, 2):
        ours, theirs = outcomes[likelier], outcomes[other]
        bits = Answer(
            f"{likelier} against {other}: fewer bits per dimension",
            difference(numbers(ours, MEASURES["bpd"]), numbers(theirs, MEASURES["bpd"])),
            "difference",
        )
        distance = Answer(
            f"{likelier} against {other}: and yet a larger FD",
            ratio(numbers(ours, MEASURES["fd"]), numbers(theirs, MEASURES["fd"])),
            "ratio",
            "above",
        )
        if bits.verdict == distance.verdict == "yes":
            found += [bits, distance]
    return found


def _likelihood_of_finetuning(finetuned: Mapping[int, Outcome]) -> list[Answer]:
    """What bits per dimension and FD say of the same models, before and after all was forgotten."""
    bits, distance = (numbers(finetuned, read) for read in (_first_bpd_grown, _fd_grown))
    nothing = dict.fromkeys(finetuned, 1.0)
    return [
        Answer(
            "finetune: bits per dimension of the first task, at the end over when it was learnt, have fallen",
            ratio(bits, nothing),
            "ratio",
        ),
        Answer(
            "finetune: FD to all classes learnt, at the end over after the first task, has grown",
            ratio(distance, nothing),
            "ratio",
            "above",
        ),
    ]


def _first_bpd_grown(outcome: Outcome) -> float:
    bpd = outcome.result["matrix"]["bpd"]
    return bpd[-1][0] / bpd[0][0]


def _fd_grown(outcome: Outcome) -> float:
    rows = outcome.result["after_task"]
    return rows[-1]["fd"] / rows[0]["fd"]


def _penalty(outcomes: Outcomes) -> list[Answer]:
    return [answer for row in QUESTIONS["penalty"].rows[1:] for answer in _better(outcomes, row, GD)]


def _joint_models(outcomes: Outcomes) -> list[Answer]:
    """The paper's order, and how far from its bounds."""
    return [
        *_more_accurate(outcomes, JDCL, FINETUNE_BOTH, 0.15),
        *_more_accurate(outcomes, JDCL, JOINT_BOTH, -0.10),
        *_more_accurate(outcomes, JDCL, SEPARATE, 0.0),
        *_more_accurate(outcomes, SEPARATE, UNDISTILLED, 0.0),
        *_more_accurate(outcomes, JDCL, UNDISTILLED, 0.0),
    ]


def _more_accurate(outcomes: Outcomes, ours: str, theirs: str, by: float) -> list[Answer]:
    """That the average accuracy of a row is more than so much above another's."""
    if ours not in outcomes or theirs not in outcomes:
        return []
    read = MEASURES["average_accuracy"]
    measured = difference(numbers(outcomes[ours], read), numbers(outcomes[theirs], lambda run: read(run) + by))
    bar = f"{ours} more than {100 * by:+.0f} points from {theirs}" if by else f"{ours} above {theirs}"
    return [Answer(f"average accuracy: {bar}", measured, "difference", "above")]


def _better(outcomes: Outcomes, better: str, worse: str) -> list[Answer]:
    return [
        *_less(outcomes, better, worse, "fd", "ratio"),
        *_less(outcomes, better, worse, "kld", "difference"),
    ]


def _less(outcomes: Outcomes, less: str, more: str, key: str, kind: Literal["ratio", "difference"]) -> list[Answer]:
    if less not in outcomes or more not in outcomes:
        return []
    ours, theirs = numbers(outcomes[less], MEASURES[key]), numbers(outcomes[more], MEASURES[key])
    measured = (ratio if kind == "ratio" else difference)(ours, theirs)
    return [Answer(f"{_NAMES.get(key, key)}: {less} below {more}", measured, kind)]


def _means(series: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*series, strict=True)]


_NAMES = {"fd": "FD", "kld": "KLD", "memorised": "share of samples that copy the buffer"}
_ANSWERS: dict[str, Callable[[Outcomes], list[Answer]]] = {
    "order": _order,
    "rehearsal": _rehearsal,
    "timesteps": _timesteps,
    "likelihood": _likelihood,
    "penalty": _penalty,
    "joint_models": _joint_models,
}
