"""Rows of results: what holds is computed; times taken side by side; the README's table is made from the results."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from catalogue import BENCHMARKS, NOT_MEASURED, Benchmark, Promise, rows_of, table, with_table
from claims import README, Claim, Report, package_versions, quartiles, side_by_side
from claims import main as claims_main

ROW = {"claim", "ours", "peer", "unit", "ratio", "bar", "holds", "hardware", "command", "versions", "spread"}


@pytest.mark.parametrize(
    ("bound", "ours", "peer", "holds"),
    [
        ("at least", [130.0, 120.0, 129.0], [100.0, 99.0, 101.0], True),  # 1.29
        ("at least", [124.0, 200.0, 110.0], [100.0, 100.0, 100.0], False),  # 1.24, whatever the best round was
        ("at most", [124.0, 200.0, 110.0], [100.0, 100.0, 100.0], True),
        ("at most", [126.0], [100.0], False),
        ("at least", [1.25], [], True),  # a bar on the quantity itself
        ("at least", [1.24], [], False),
        ("at least", [math.nan], [1.0], False),
        ("at most", [math.nan], [1.0], False),
    ],
)
def test_holds_is_computed(
    bound: Literal["at least", "at most"], ours: list[float], peer: list[float], holds: bool
) -> None:
    claim = Claim("speed", "images/s", 1.25, ours, peer, bound=bound)
    assert claim.holds(cuda=True) is holds
    assert claim.holds(cuda=False) is None, "the bar is about a GPU"
    assert Claim("speed", "images/s", 1.25, ours, peer, bound=bound, needs_cuda=False).holds(cuda=False) is holds


def test_nothing_holds_that_was_not_measured() -> None:
    absent = Claim("speed", "images/s", 1.25, [], [1.0], against="them", missing="it broke")
    assert absent.holds(cuda=True) is None
    row = absent.row("command", "card", {}, cuda=True)
    assert row["why_not"] == "it broke" and row["ratio"] is None
    unopposed = Claim("speed", "images/s", 1.25, [99.0], [], against="them")
    assert unopposed.holds(cuda=True) is None, "without its peer the number alone is no ratio"


def test_a_report_has_the_rows_that_everybody_expects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("python benchmarks/x.py", tmp_path / "results" / "x.json", cuda=False)
    report.details["note"] = "more"
    report.add(Claim("fast", "ms", 1.03, [2.0, 1.0, 3.0], [4.0], bound="at most", needs_cuda=False))
    assert report.conclude() == 0
    report.add(Claim("faster", "ms", 0.1, [2.0], [4.0], bound="at most", needs_cuda=False))
    assert report.conclude() == 1, "a claim does not hold"
    content = json.loads((tmp_path / "results" / "x.json").read_text())
    assert content["note"] == "more" and content["versions"]["torch"] == torch.__version__
    fast, faster = content["rows"]
    assert fast.keys() >= ROW
    assert (fast["ours"], fast["peer"], fast["ratio"]) == (2.0, 4.0, 0.5)
    assert fast["spread"] == {"ours": [1.5, 2.5], "peer": [4.0, 4.0]}
    assert [fast["holds"], faster["holds"]] == [True, False]
    printed = capsys.readouterr().out
    assert "faster" in printed and "NO" in printed


def test_quartiles_and_versions() -> None:
    assert quartiles([]) == []
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0]
    versions = package_versions(("numpy", "no-such-package"))
    assert versions.keys() == {"python", "numpy"}


def test_side_by_side_takes_turns_and_keeps_the_first_call_apart() -> None:
    calls: list[str] = []
    timings = side_by_side(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")},
        torch.device("cpu"),
        rounds=3,
        calls=2,
        warmup=1,
    )
    assert "".join(calls) == "ab" + "ab" + "aabb" + "bbaa" + "aabb"
    assert all(len(timing.rounds) == 3 and timing.first > 0 and min(timing.rounds) > 0 for timing in timings.values())


def test_the_readme_shows_what_the_results_say() -> None:
    assert claims_main(["--table", "--check"]) == 0, "run python benchmarks/claims.py --table"


def test_a_changed_table_is_noticed() -> None:
    text = README.read_text()
    made = table(README.parent / "results")
    assert with_table(text.replace("needs a GPU", "was measured", 1), made) == text
    assert text.replace("needs a GPU", "was measured", 1) != text or "needs a GPU" not in made


def test_the_table_takes_verdicts_from_the_rows() -> None:
    benchmark = Benchmark("Title", "python x.py", "x", (Promise("fast", "≥ 2", "them"),))
    before = rows_of(benchmark, {})
    assert [row["measured"] for row in before] == [NOT_MEASURED]
    row: dict[str, Any] = Claim("fast", "ms", 2, [3.0], [1.0], against="them").row("c", "card", {}, cuda=True)
    shown = rows_of(benchmark, {"rows": [row, row | {"holds": False}, row | {"holds": None, "why_not": "needs CUDA"}]})
    assert [line["holds"] for line in shown] == ["yes", "**no**", ""]
    assert [line["measured"] for line in shown] == ["3 (3, 1 ms)", "3 (3, 1 ms)", NOT_MEASURED]
    assert {line["bar"] for line in shown} == {before[0]["bar"]}


@pytest.mark.parametrize("name", [benchmark.result for benchmark in BENCHMARKS if benchmark.read])
def test_results_without_rows_are_judged_from_their_numbers(name: str) -> None:
    (benchmark,) = (benchmark for benchmark in BENCHMARKS if benchmark.result == name)
    content = json.loads((README.parent / "results" / f"{name}.json").read_text())
    held = {row["holds"] for row in rows_of(benchmark, content)}
    assert "yes" in held and "**no**" not in held
    spoilt = {
        "resume": {"same_weights": False},
        "chaos": {"lost": ["an image"]},
        "checkpoint": {"standstill": 1e9},
        "digits-methods": {"rows": [spoil(row) for row in content.get("rows", []) if "summary" in row]},
        "replay_quality_digits": {"bars": dict.fromkeys(content.get("bars", {}), 0.0)},
        "replay_quality_fashion_mnist": {"bars": dict.fromkeys(content.get("bars", {}), 0.0)},
    }
    assert "**no**" in {row["holds"] for row in rows_of(benchmark, content | spoilt[name])}


def spoil(row: Any) -> Any:
    """A method's row with more forgetting than anybody has."""
    worse = row["summary"]["forgetting"] | {"median": 1e9}
    return row if row["name"] == "finetune" else row | {"summary": row["summary"] | {"forgetting": worse}}
