"""The field's findings looked at again: what counts as found, from made-up runs whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from field.answers import Answer, answers_of, rows_of
from field.document import table
from field.outcome import Outcome
from field.plot import plot
from field.rows import DATA, FINETUNE_BOTH, GD, GR, JDCL, JOINT, JOINT_BOTH, QUESTIONS, SETTINGS, settings_of
from methods import choose, last_words, show
from quality.paired import Interval

from trainer.errors import UserError
from trainer.settings import load_config


def outcome(
    fd: float, kld: float, bpd: float = 4.0, memorised: float = 0.1, grown: float = 1.5, accuracy: float = 0.5
) -> Outcome:
    """Of two tasks; the loss of the first grew by half in the first bin, by `grown` in the next, not in the last."""
    learnt, end = [0.2, 0.04, 0.02], [0.3, 0.04 * grown, 0.02]
    forgotten = [a - b for a, b in zip(end, learnt, strict=True)]
    result: dict[str, Any] = {
        "matrix": {"bpd": [[3.0, None], [bpd - 1.0, bpd + 1.0]], "loss_bins": [[learnt, None], [end, learnt]]},
        "after_task": [{"fd": 2.0}, {"fd": fd}],
        "final": {
            **{"classifier_accuracy": 0.9, "forgetting_loss_bins": [forgotten]},
            **{"average_accuracy": accuracy, "forgetting_model_accuracy": 0.1, "backward_transfer": -0.1},
        },
    }
    final = {"fd": fd, "kld": kld, "precision": 0.8, "recall": 0.7, "density": 1.0, "coverage": 0.9}
    return Outcome({**final, "nearest": {"buffer": {"features": {"memorised": memorised}}}}, result)


def order() -> dict[str, dict[int, Outcome]]:
    """joint and distillation are equal but for the seed, replay is twice as far, finetuning is scattered."""
    fd = {JOINT: (4.0, 5.1, 6.0), GD: (4.1, 5.0, 6.1), GR: (8.0, 10.0, 12.4), "finetune": (7.0, 30.0, 10.0)}
    return {row: {seed: outcome(value, value / 100) for seed, value in enumerate(seen)} for row, seen in fd.items()}


def test_an_order_holds_where_the_whole_interval_says_so() -> None:
    answers = {answer.claim: answer for answer in answers_of(QUESTIONS["order"], order())}
    assert [answer.verdict for answer in answers.values()] == ["open", "open", "yes", "yes", "open", "open"]
    assert answers[f"FD: {GD} below {GR}"].measured.mean == pytest.approx(0.5, rel=0.02)
    assert answers[f"KLD: {GD} below {GR}"].measured.mean == pytest.approx(-0.0507, abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "expected", "verdict"),
    [(0.5, 0.9, "below", "yes"), (1.1, 2.0, "below", "no"), (0.9, 1.1, "below", "open"), (1.1, 2.0, "above", "yes")],
)
def test_verdicts(low: float, high: float, expected: Any, verdict: str) -> None:
    assert Answer("a", Interval(1.0, low, high), "ratio", expected).verdict == verdict
    assert Answer("a", Interval(0.0, low - 1, high - 1), "difference", expected).verdict == verdict


def test_one_seed_decides_nothing() -> None:
    one = {row: {0: seeds[0]} for row, seeds in order().items()}
    assert {answer.verdict for answer in answers_of(QUESTIONS["order"], one)} == {"open"}


def test_a_row_without_runs_is_left_out() -> None:
    some = {row: seeds for row, seeds in order().items() if row != GR}
    assert [row["row"] for row in rows_of(QUESTIONS["order"], some, "digits")] == [JOINT, GD, "finetune"]
    assert [answer.claim for answer in answers_of(QUESTIONS["order"], some)] == [
        f"FD: {JOINT} below {GD}",
        f"KLD: {JOINT} below {GD}",
    ]


def test_the_last_value_of_a_setting_counts() -> None:
    assert last_words(["a.b=1", "a.c=2", "a.b=3=4"]) == ["a.b=3=4", "a.c=2"]


def test_some_rows_can_be_chosen() -> None:
    assert choose(QUESTIONS["order"], f"finetune,{GD}").rows == (GD, "finetune")
    assert choose(QUESTIONS["order"], None) == QUESTIONS["order"]
    with pytest.raises(UserError, match="order has no er-1"):
        choose(QUESTIONS["order"], "er-1")


def test_reduced_coefficients_are_set_against_one() -> None:
    rows = {
        "er-1": {seed: outcome(10.0 + seed, 0.2, memorised=0.5) for seed in range(3)},
        "er-0.5": {seed: outcome(5.0 + 0.5 * seed, 0.1, memorised=0.2 + 0.01 * seed) for seed in range(3)},
    }
    answers = answers_of(QUESTIONS["rehearsal"], rows)
    assert [(answer.kind, answer.verdict) for answer in answers] == [
        ("ratio", "yes"),
        ("difference", "yes"),
        ("difference", "yes"),
    ]
    assert answers[0].measured.mean == pytest.approx(0.5)
    assert answers[2].measured.mean == pytest.approx(-0.29)


def test_bits_mislead_where_they_prefer_what_fd_does_not() -> None:
    rows = {
        GD: {seed: outcome(5.0 + seed, 0.1, bpd=4.2 + 0.01 * seed) for seed in range(3)},
        GR: {seed: outcome(20.0 + seed, 0.1, bpd=3.9 + 0.02 * seed) for seed in range(3)},
        JOINT: {seed: outcome(4.0 + seed, 0.1, bpd=3.0 + 0.03 * seed) for seed in range(3)},
    }
    answers = answers_of(QUESTIONS["likelihood"], rows)
    assert [answer.claim for answer in answers] == [
        f"{GR} against {GD}: fewer bits per dimension",
        f"{GR} against {GD}: and yet a larger FD",
    ]
    assert all(answer.verdict == "yes" for answer in answers)


def test_bits_mislead_where_all_is_forgotten() -> None:
    rows = {"finetune": {seed: outcome(40.0 + seed, 2.0, bpd=3.9 + 0.01 * seed) for seed in range(3)}}
    bits, distance = answers_of(QUESTIONS["likelihood"], rows)
    assert bits.verdict == distance.verdict == "yes"
    assert bits.measured.mean == pytest.approx(2.91 / 3.0, abs=1e-4)
    assert distance.measured.mean == pytest.approx(20.5, abs=0.01)


def test_growth_by_timestep() -> None:
    rows = {GD: {seed: outcome(5.0, 0.1, grown=3.0 + 0.1 * seed) for seed in range(3)}}
    (row,), (first, last) = rows_of(QUESTIONS["timesteps"], rows, "digits"), answers_of(QUESTIONS["timesteps"], rows)
    assert row["loss_grown"] == pytest.approx([1.5, 3.1, 1.0])
    assert row["loss_forgotten"] == pytest.approx([0.1, 0.084, 0.0])
    middle = (3.0 * 3.1 * 3.2) ** (1 / 3)
    assert first.measured.mean == pytest.approx(1.5 / middle) and first.verdict == "yes"
    assert last.measured.mean == pytest.approx(1.0 / middle) and last.verdict == "yes"
    assert rows[GD][0].bpd_grown == pytest.approx(1.0)


def test_accuracies_are_set_against_bars_in_points() -> None:
    accuracies = {JDCL: 0.9, JOINT_BOTH: 0.95, FINETUNE_BOTH: 0.8}
    rows = {
        row: {seed: outcome(5.0, 0.1, accuracy=value + 0.001 * seed * place) for seed in range(3)}
        for place, (row, value) in enumerate(accuracies.items())
    }
    found = {answer.claim: answer for answer in answers_of(QUESTIONS["joint_models"], rows)}
    above, within = found.values()
    assert above.claim == f"average accuracy: {JDCL} more than +15 points from {FINETUNE_BOTH}"
    assert above.verdict == "no" and above.measured.mean == pytest.approx(0.9 - 0.8 - 0.15 - 0.002)
    assert within.verdict == "yes" and within.measured.mean == pytest.approx(0.9 - 0.95 + 0.10 - 0.001)


@pytest.mark.parametrize("name", list(QUESTIONS))
def test_every_question_has_a_table_and_a_picture(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = QUESTIONS[name]
    outcomes = {
        row: {seed: outcome(4.0 + seed + place, 0.1 + 0.01 * place, bpd=4.0 + place) for seed in range(2)}
        for place, row in enumerate(question.rows)
    }
    rows, answers = rows_of(question, outcomes, "digits"), answers_of(question, outcomes)
    show(question, rows, answers, "digits")
    assert question.rows[0] in capsys.readouterr().out
    content = {
        "command": f"python benchmarks/methods.py {name}",
        "question": {"name": name, "text": question.text},
        "data": "digits",
        "rows": rows,
        "answers": [answer.as_json() for answer in answers],
    }
    text = table(content)
    assert all(f"\n| {row} | 2 |" in text for row in question.rows)
    assert all(answer.claim in text for answer in answers)
    plot(content, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", list(DATA))
def test_every_row_is_a_configuration(data: str) -> None:
    settings = DATA[data]
    rows = [settings_of(name, data) for name in SETTINGS]
    found = [load_config(settings.config, [*settings.settings, *mine, "run.name=a"]) for mine in rows]
    assert all(one != other for place, one in enumerate(found) for other in found[:place])
