"""The comparison of ways to replay: its statistics against scipy's, its rows, and that every variant can be run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from quality.paired import interval, paired_difference, paired_ratio
from quality.plot import plot
from quality.result import collect, rows_of
from quality.variants import DATA, DEFAULT, INLINE, MAIN, VARIANTS, variant
from replay_quality import choose, share_seeds, show
from scipy import stats

from trainer.compare import Run
from trainer.errors import UserError
from trainer.run import RunDir
from trainer.settings import load_config


def test_intervals_are_those_of_scipy() -> None:
    random = np.random.default_rng(3)
    ours, other = random.lognormal(1.0, 0.3, 12), random.lognormal(1.1, 0.3, 12)
    found, expected = paired_difference(list(ours), list(other)), stats.ttest_rel(ours, other)
    low, high = expected.confidence_interval(0.9)
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    ratio, logs = paired_ratio(list(ours), list(other)), stats.ttest_rel(np.log(ours), np.log(other))
    low, high = logs.confidence_interval(0.9)
    assert ratio.mean == pytest.approx(stats.gmean(ours) / stats.gmean(other))
    assert (ratio.low, ratio.high) == (pytest.approx(math.exp(low)), pytest.approx(math.exp(high)))


def test_one_value_has_no_interval() -> None:
    found = interval([2.5])
    assert found.mean == 2.5 and found.low is None and found.high is None


def test_ninety_per_cent_of_the_intervals_hold_the_truth() -> None:
    random = np.random.default_rng(0)
    hits = 0
    for values in random.normal(1.0, 2.0, (2000, 5)):
        found = interval(list(values))
        assert found.low is not None and found.high is not None
        hits += found.low <= 1.0 <= found.high
    assert stats.binomtest(hits, 2000, 0.9).pvalue > 1e-3


def numbers(fd: float, kld: float, forwards: float) -> dict[str, float]:
    return {"fd": fd, "kld": kld, "teacher_forwards_per_point": forwards}


def some_rows() -> list[dict[str, Any]]:
    inline = {seed: numbers(4.0 + seed, 0.05, 11.0) for seed in range(3)}
    better = {seed: numbers((4.0 + seed) * 0.9, 0.051, 2.0) for seed in range(3)}
    worse = {seed: numbers((4.0 + seed) * 2.0, 0.5, 3.0) for seed in (0, 2)}
    unpaired = {7: numbers(5.0, 0.1, 1.0)}
    return rows_of({INLINE: inline, DEFAULT: better, "points-5": worse, "on-path": unpaired})


def test_rows_compare_the_seeds_that_are_shared() -> None:
    inline, better, worse, unpaired = some_rows()
    assert "fd_ratio" not in inline and inline["fd"] == 5.0 and inline["spread"]["fd"]["sd"] == 1.0
    assert better["fd_ratio"]["mean"] == pytest.approx(0.9) and better["fd_ratio"]["high"] == pytest.approx(0.9)
    assert better["verdict"] == {"fd": "reached", "kld": "reached", "teacher_forwards_per_point": "reached"}
    assert worse["paired_seeds"] == 2 and worse["seeds"] == [0, 2]
    assert worse["verdict"] == {"fd": "missed", "kld": "missed", "teacher_forwards_per_point": "missed"}
    assert worse["fd_over_default"]["mean"] == pytest.approx(2.0 / 0.9)
    assert not any("fd_over_default" in row for row in (inline, better, unpaired))
    assert "verdict" not in unpaired and unpaired["by_seed"]["fd"] == [5.0]


def test_too_few_seeds_leave_a_bar_open() -> None:
    one = rows_of({INLINE: {0: numbers(4.0, 0.0, 11.0)}, DEFAULT: {0: numbers(4.0, 0.0, 2.0)}})[1]
    assert one["verdict"] == {"fd": "open", "kld": "open", "teacher_forwards_per_point": "reached"}
    scattered = {0: numbers(3.0, 0.0, 2.0), 1: numbers(6.0, 0.0, 2.0)}
    two = rows_of({INLINE: {0: numbers(4.0, 0.0, 11.0), 1: numbers(4.0, 0.0, 11.0)}, DEFAULT: scattered})[1]
    assert two["verdict"]["fd"] == "open" and two["verdict"]["kld"] == "reached"


def test_table_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = some_rows()
    show(rows, "digits")
    printed = capsys.readouterr().out
    assert "0.900 (0.900..0.900)" in printed and "5.00 (4.00..6.00)" in printed
    plot(rows, tmp_path / "a.png", "digits")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("data", list(DATA))
@pytest.mark.parametrize("name", [one.name for one in VARIANTS])
def test_every_variant_is_a_configuration_and_differs_from_the_default(data: str, name: str) -> None:
    settings, one = DATA[data], variant(name)
    changed = load_config(settings.config, [*settings.settings, *one.settings, "run.name=a"])
    default = load_config(settings.config, [*settings.settings, "run.name=a"])
    assert (changed == default) == (name == DEFAULT)


def test_unknown_variants_are_named() -> None:
    assert [one.name for one in choose("all")] == [one.name for one in VARIANTS]
    assert [one.name for one in choose(",".join(MAIN))] == list(MAIN)
    with pytest.raises(UserError, match="unknown nothing"):
        choose("inline,nothing")


def test_the_pair_that_the_bars_are_about_gets_more_seeds() -> None:
    shared = share_seeds(choose("on-path,default,both,inline"), 10, 3)
    assert [([one.name for one in group], seeds) for group, seeds in shared] == [
        (["default", "inline"], 10),
        (["on-path", "both"], 3),
    ]
    assert share_seeds(choose("both"), 10, 3) == [(choose("both"), 3)]


def test_measured_models_are_not_measured_again(tmp_path: Path) -> None:
    """Without a run to measure the command would fail."""
    result = {"cost": {"teacher_evaluations": 30, "replay_points_used": 15}}
    run = Run("default", 4, [], RunDir(tmp_path / "a"), tmp_path / "log", tasks=2, result=result)
    with pytest.raises(UserError, match="default seed 4"):
        collect([run], samples=10, jobs=1)
    run.directory.root.mkdir()
    (run.directory.root / "measured.json").write_text(json.dumps({"fd": 2.0, "kld": 0.1, "samples": 10}))
    assert collect([run], samples=10, jobs=1) == {"default": {4: numbers(2.0, 0.1, 2.0)}}
    with pytest.raises(UserError):
        collect([run], samples=11, jobs=1)
