"""kill -9 of a rank, of all ranks or of the sampler, at random moments: the same command ends with the same weights.

Ranks and samplers are forked (see `zygote`), so that a case takes seconds. What deepspeed's launcher does with its
ranks is `test_launcher`'s.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import pytest

from trainer.replay.manifest import MANIFEST_NAME
from trainer.replay.state import read_json

from .conftest import TASKS, TINY, Workplace
from .endurance import SECONDS, Run

STEPS = 6  # of each of the two tasks
SETTINGS: dict[str, Any] = TINY | {
    "train": TINY["train"] | {"images_per_task": STEPS * 16},
    "replay": TINY["replay"] | {"shard_trajectories": 8, "sampler_batch": 8, "placement": "external"},
    "evaluation": {"samples": 8, "steps": 1, "classifier_epochs": 1, "grid_per_class": 1},
    "checkpoint": {"every_images": 16},
    "tracking": {"progress": False},
}


CLASSIFYING = ("model.conditional=false", "model.classifier=joint")


@dataclass(frozen=True)
class Case:
    """What is trained, and what is killed."""

    method: str
    stage: int
    precision: str
    ranks: int
    victim: str
    ema: float
    micro_batch: int

    def __str__(self) -> str:
        return "-".join(map(str, astuple(self)))

    @property
    def needs_sampler(self) -> bool:
        return self.method.startswith(("generative", "jdcl"))

    @property
    def possible(self) -> bool:
        """ZeRO-0 is refused in bf16; one rank is all ranks; without a sampler none can die."""
        precise = self.stage > 0 or self.precision == "fp32"
        alone = {"rank": self.ranks > 1, "all": True, "sampler": self.needs_sampler}[self.victim]
        return precise and alone

    @property
    def settings(self) -> tuple[str, ...]:
        return (
            *(f"method.name={self.method}", f"zero.stage={self.stage}", f"train.precision={self.precision}"),
            *(f"ema.decay={self.ema}", f"train.micro_batch={self.micro_batch}"),
            *(CLASSIFYING if self.method == "jdcl" else ()),
        )


FACTORS: dict[str, tuple[Any, ...]] = {
    "method": ("finetune", "joint", "experience_replay", "generative_replay", "generative_distillation", "jdcl"),
    "stage": (0, 1, 2, 3),
    "precision": ("fp32", "bf16"),
    "ranks": (1, 2),
    "victim": ("rank", "all", "sampler"),
    "ema": (0.0, 0.9),
    "micro_batch": (0, 4),
}
CASES = [case for values in itertools.product(*FACTORS.values()) if (case := Case(*values)).possible]


def pairs(case: Case) -> frozenset[tuple[str, Any, str, Any]]:
    """Each two factors with the values that they have in a case."""
    values = [(item.name, getattr(case, item.name)) for item in fields(case)]
    return frozenset((*first, *second) for first, second in itertools.combinations(values, 2))


def pairwise(cases: list[Case]) -> Iterator[Case]:
    """A few of the cases in which all pairs of values occur that can: always the one with the most new pairs."""
    cases = random.Random(0).sample(cases, len(cases))  # so that ties are settled for varied cases
    left = set().union(*map(pairs, cases))
    while left:
        best = max(cases, key=lambda case: len(pairs(case) & left))  # the first of several
        left -= pairs(best)
        yield best


PAIRWISE = list(pairwise(CASES))
# In the whole product, EMA and micro-batches vary with the case instead of multiplying it.
OTHERS = [
    case
    for case in CASES
    if case not in PAIRWISE
    and (case.ema > 0) == ((case.stage + case.ranks) % 2 == 0)
    and (case.micro_batch > 0) == (len(case.method + case.victim) % 2 == 0)
]


def test_the_cases_cover_all_pairs() -> None:
    chosen = set().union(*map(pairs, PAIRWISE))
    for first, second in itertools.combinations(FACTORS, 2):
        for a, b in itertools.product(FACTORS[first], FACTORS[second]):
            possible = any(getattr(case, first) == a and getattr(case, second) == b for case in CASES)
            assert ((first, a, second, b) in chosen) == possible
    main = [name for name in FACTORS if name not in ("ema", "micro_batch")]
    whole = {tuple(getattr(case, name) for name in main) for case in CASES}
    assert {tuple(getattr(case, name) for name in main) for case in (*PAIRWISE, *OTHERS)} == whole


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, zygote: None) -> str:
    """The root of a data set whose evaluator is trained already."""
    place = Workplace(tmp_path_factory.mktemp("data") / "place", SETTINGS)
    code, output = place.run("run.name=first", TASKS, "method.name=finetune")
    assert code == 0, output
    return str(next((place.path / "data").iterdir()))


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_killed_run_ends_with_the_same_weights(tmp_path: Path, data: str, case: Case) -> None:
    check(case, tmp_path, data)


@pytest.mark.slow
@pytest.mark.parametrize("case", OTHERS, ids=str)
def test_killed_run_ends_with_the_same_weights_in_every_case(tmp_path: Path, data: str, case: Case) -> None:
    check(case, tmp_path, data)


JDCL = (
    *("method.name=jdcl", *CLASSIFYING, "jdcl.real_images=true", "jdcl.warmup_images=48", "data.labelled=0.5"),
    *("jdcl.fixmatch_threshold=0.2", "ema.decay=0.9", "zero.stage=2"),
)


@pytest.fixture(scope="module")
def jdcl_twin(tmp_path_factory: pytest.TempPathFactory, data: str) -> Iterator[Run]:
    """A run of jdcl that nobody disturbed."""
    run = Run(tmp_path_factory.mktemp("jdcl") / "twin", SETTINGS, steps=STEPS, sampler=True)
    run.start(2, f"data.root={data}", *JDCL)
    run.conclude()
    yield run
    run.place.close()


@pytest.mark.parametrize(
    ("stage", "steps"),
    [("first", 3), ("local", STEPS + 2), ("between", 2 * STEPS), ("global", 2 * STEPS + 3)],
    ids=lambda value: str(value),
)
def test_jdcl_killed_in_each_stage_ends_with_the_same_weights(
    tmp_path: Path, data: str, jdcl_twin: Run, stage: str, steps: int
) -> None:
    run = Run(tmp_path / "killed", SETTINGS, steps=STEPS, sampler=True)
    try:
        ranks = run.start(2, f"data.root={data}", *JDCL)
        assert run.wait_until(lambda: run.checkpointed() >= steps), f"it ended before the {stage} stage was over"
        for rank in ranks.jobs:
            rank.kill()
        ranks.wait(SECONDS)
        run.start(2, f"data.root={data}", *JDCL)
        run.conclude()
        for task in (1, 2):
            assert run.place.teacher_id("run", task) == jdcl_twin.place.teacher_id("run", task)
        assert run.directory.local_teacher(2).joinpath("card.json").exists()
        result, reference = run.place.metrics("run"), jdcl_twin.place.metrics("run")
        assert result["matrix"] == reference["matrix"] and "model_accuracy" in result["matrix"]
    finally:
        run.place.close()


def check(case: Case, path: Path, data: str) -> None:
    twin = Run(path / "twin", SETTINGS, steps=STEPS, sampler=case.needs_sampler)
    run = Run(path / "killed", SETTINGS, steps=STEPS, sampler=case.needs_sampler)
    arguments = (f"data.root={data}", *case.settings)
    try:
        twin.start(case.ranks, *arguments)
        kills = suffer(run, case, arguments)
        if run.trainers is None or run.trainers.poll():
            run.start(case.ranks, *arguments)
        run.conclude()
        twin.conclude()
    finally:
        twin.place.close()
        run.place.close()
    assert kills
    for task in (1, 2):
        assert run.place.teacher_id("run", task) == twin.place.teacher_id("run", task)
    result, reference = run.place.metrics("run"), twin.place.metrics("run")
    assert result["matrix"] == reference["matrix"]
    rehearsed = STEPS * 16 if case.method not in ("finetune", "joint") else 0
    assert result["cost"]["replay_points_used"] == reference["cost"]["replay_points_used"] == rehearsed


def suffer(run: Run, case: Case, arguments: tuple[str, ...]) -> int:
    """Up to three kills at moments drawn for the case, the first certain to come before the end; their number."""
    chance, kills = random.Random(str(case)), 0
    for number in range(chance.randint(1, 3)):
        if run.trainers is None or run.trainers.poll():
            run.start(case.ranks, *arguments)
        moment = progress(run, case, chance) if number == 0 or chance.random() < 0.5 else any_time(chance)
        if run.wait_until(moment):
            kill(run, case, chance)
            kills += 1
    return kills


def progress(run: Run, case: Case, chance: random.Random) -> Callable[[], bool]:
    """The moment at which the sampler has come a bit further, or the ranks a few checkpoints."""
    if case.victim == "sampler":
        assert run.sampler is not None
        pid, shards = run.sampler.pid, chance.randint(0, 2)
        manifest = run.directory.replay(2) / MANIFEST_NAME
        return lambda: read_json(run.directory.sampler(0)).get("pid") == pid and count_lines(manifest) >= shards
    steps = run.checkpointed() + chance.randint(1, STEPS - 1)
    return lambda: run.checkpointed() >= steps


def kill(run: Run, case: Case, chance: random.Random) -> None:
    """SIGKILL; where a rank dies, all end."""
    assert run.trainers is not None
    if case.victim == "sampler":
        assert run.sampler is not None
        run.sampler.kill()
        return
    for victim in run.trainers.jobs if case.victim == "all" else [chance.choice(run.trainers.jobs)]:
        victim.kill()
    run.trainers.wait(SECONDS)
    run.check_orphans()


def any_time(chance: random.Random) -> Callable[[], bool]:
    moment = time.monotonic() + chance.uniform(0.0, 1.5)
    return lambda: time.monotonic() >= moment


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
