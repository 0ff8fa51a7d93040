"""Taking turns: who computes when, what is timed, and what becomes of a contender that breaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch
from claims import WrongResult
from speed.profile import Marks, Profile
from speed.race import Race
from speed.turns import Contender, ContenderFailed, Entry, Turns

CPU = torch.device("cpu")


def counting(turns: Turns, *, log: str, name: str, seconds: float = 0.0) -> None:
    """Writes its name at each step."""
    turns.facts["pid"] = os.getpid()
    turns.start()
    while True:
        with Path(log).open("a") as file:
            file.write(name)
        time.sleep(seconds)
        turns.note(torch.tensor(1.5), torch.tensor(0.5))
        turns.step_done()


def broken(turns: Turns, *, after: int) -> None:
    turns.start()
    for _ in range(after):
        turns.step_done()
    raise ValueError("out of\nmemory")


def dying(turns: Turns) -> None:
    turns.start()
    os._exit(3)


def lying(turns: Turns) -> None:
    raise WrongResult("2 where 1 is right")


def test_contenders_take_turns(tmp_path: Path) -> None:
    log = tmp_path / "log"
    entries = {name: Entry(counting, {"log": str(log), "name": name}) for name in "ab"}
    with Race(entries, "cpu", seconds=120, lanes=1) as race:
        assert race.enter("ab", 2) == ["a", "b"]
        assert log.read_text() == "aabb"
        answers = race.rounds("ab", 3, 1, 2, seconds=60.0)
        assert log.read_text() == "aabb" + "aaabbb" + "bbbaaa" + "aaabbb"
        assert [answer["steps"] for answer in answers["a"]] == [2, 2, 2]
        profiles = race.profile("ab", 1)
        assert log.read_text().endswith("aabb")
    assert race.failed == {} and race.skipped == []
    assert race.facts["a"]["pid"] != race.facts["b"]["pid"] != os.getpid()
    assert race.warm["a"]["losses"] == [1.5, 1.5] and race.warm["a"]["grad_norms"] == [0.5, 0.5]
    assert profiles.keys() == {"a", "b"}
    with pytest.raises(ProcessLookupError):
        os.kill(race.facts["a"]["pid"], 0)


def test_slow_contenders_take_fewer_steps(tmp_path: Path) -> None:
    entries = {"slow": Entry(counting, {"log": str(tmp_path / "log"), "name": "s", "seconds": 0.05})}
    with Race(entries, "cpu", seconds=120, lanes=1) as race:
        race.enter(entries, 2)
        (answer,) = race.rounds(["slow"], 1, 9, 40, seconds=0.2)["slow"]
    assert 1 <= answer["steps"] <= 4
    assert answer["seconds"] >= 0.05 * answer["steps"] > answer["cpu_seconds"]
    taken = (tmp_path / "log").read_text().count("s")
    assert taken == 2 + 2 * answer["steps"], "no more settling than timed steps"


def test_a_broken_contender_leaves_the_race_to_the_others(tmp_path: Path) -> None:
    entries = {
        "late": Entry(broken, {"after": 3}),
        "early": Entry(broken, {"after": 0}),
        "dead": Entry(dying),
        "good": Entry(counting, {"log": str(tmp_path / "log"), "name": "g"}),
    }
    with Race(entries, "cpu", seconds=120, lanes=2) as race:
        assert race.enter(entries, 2) == ["late", "good"]
        answers = race.rounds(["late", "good"], 2, 0, 2, seconds=60.0)
    assert len(answers["good"]) == 2 and answers["late"] == []
    assert race.failed == {
        "early": "early: ValueError: out of memory",
        "dead": "dead: its process died",
        "late": "late: ValueError: out of memory",
    }


def test_a_wrong_result_ends_everything() -> None:
    with (
        pytest.raises(WrongResult, match="liar: 2 where 1"),
        Race({"liar": Entry(lying)}, "cpu", seconds=99, lanes=1) as race,
    ):
        race.enter(["liar"], 1)


def test_without_time_nothing_is_begun(tmp_path: Path) -> None:
    entries = {"a": Entry(counting, {"log": str(tmp_path / "log"), "name": "a"})}
    with Race(entries, "cpu", seconds=0, lanes=1) as race:
        assert race.enter("a", 2) == []
        assert race.failed == {"a": "a: no time was left"}
    assert not (tmp_path / "log").exists()


def test_a_contender_that_does_not_answer_is_given_up(tmp_path: Path) -> None:
    contender = Contender("a", Entry(counting, {"log": str(tmp_path / "log"), "name": "a", "seconds": 60.0}), "cpu")
    try:
        contender.build(60.0)
        with pytest.raises(ContenderFailed, match="no answer within 0 s"):
            contender.ask("warm", 0.2, steps=1)
    finally:
        for process in contender._processes:
            process.kill()
        contender.close()


def test_marks_divide_a_step() -> None:
    marks = Marks(CPU)
    marks("before anybody asks")
    marks.on()
    for _ in range(2):
        marks("a")
        time.sleep(0.02)
        marks("b")
    sections = marks.off()
    assert sections.keys() == {"a", "b"}
    assert sections["a"]["host"] >= 20 > sections["b"]["host"]
    assert marks.off() == {}


def test_a_profile_counts_operators() -> None:
    a = torch.randn(64, 64)
    with Profile(CPU) as profile:
        for _ in range(4):
            a @ a
    totals = profile.totals(2)
    assert totals["longest_ms"]["aten::mm"] > 0
    assert totals["busy_ms"] >= totals["longest_ms"]["aten::mm"] and totals["kernels"] >= 2
