"""Each script from end to end, at tiny sizes on the CPU: its result is well formed, its contenders agree."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu
import pytest
import sampler
import train_step
from catalogue import BENCHMARKS
from claims import Claim, Report, WrongResult
from gpu import JOBS, Job, command, summary
from speed.sizes import SIZES

ROW = {"claim", "ours", "peer", "unit", "ratio", "bar", "holds", "hardware", "command", "versions", "spread"}


def read(path: Path) -> dict[str, Any]:
    """A result whose rows are as everybody expects them, none of them judged by a CPU."""
    content = json.loads(path.read_text())
    assert content["command"].startswith("python benchmarks/") and "cores" in content["hardware"]
    for row in content["rows"]:
        assert row.keys() >= ROW
        assert row["holds"] is None and row["why_not"]
        assert row["ratio"] is None or (math.isfinite(row["ratio"]) and row["ratio"] >= 0)
    return content


def test_train_step_runs_and_its_contenders_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_step.main(["--quick", "--json", str(tmp_path / "x.json")]) == 0
    content = read(tmp_path / "x.json")
    assert content["failed"] == {} and content["skipped"] == []
    assert "training step of the program" in capsys.readouterr().out
    zero, peers, distillation = (content[part] for part in ("zero", "peers", "distillation"))
    assert zero["contenders"].keys() == {"plain", "zero-0", "zero-1", "zero-2", "zero-3"}
    assert all(error["stages"] <= 1e-6 and error["loss"] <= 1e-5 for error in zero["errors"].values())
    assert peers["errors"]["program, pool"].keys() == {"current", "replay"}
    assert distillation["contenders"].keys() == {"program, pool", "program, plain", "program, inline"}
    measured = [row for row in content["rows"] if row["ratio"] is not None]
    # All but those that need a compiler or a card.
    assert len(measured) == len(content["rows"]) - 3
    for part in (zero, peers, distillation):
        for name, known in part["contenders"].items():
            assert len(known["step_ms"]) == SIZES["quick"].rounds and min(known["step_ms"]) > 0
            assert "diffusers" in name or known["kernels"] > 0
    for name in ("zero-1", "plain"):
        assert zero["contenders"][name]["sections_ms"].keys() == {"forward", "backward", "optimizer"}
    sections = distillation["contenders"]["program, pool"]["sections_ms"]
    assert sections.keys() == {"prepare", "forward", "backward", "optimizer"}


def test_two_ranks_in_bf16_train_what_one_does(tmp_path: Path) -> None:
    how = ["--quick", "--parts", "zero", "--ranks", "2", "--precision", "bf16"]
    assert train_step.main([*how, "--json", str(tmp_path / "x.json")]) == 0
    content = read(tmp_path / "x.json")
    assert content["failed"] == {}
    errors = content["zero"]["errors"]
    assert errors.keys() == {"plain", "zero-1", "zero-2", "zero-3"}
    assert all(0 <= error["stages"] <= 2e-3 for error in errors.values())
    assert all("2 ranks" in row["claim"] for row in content["rows"])


def test_sampler_runs_and_its_trajectories_are_ddims(tmp_path: Path) -> None:
    assert sampler.main(["--quick", "--json", str(tmp_path / "x.json")]) == 0
    content = read(tmp_path / "x.json")
    assert content["failed"] == {}
    errors = {name: known["error"] for name, known in content["contenders"].items()}
    assert errors.keys() == {sampler.WRITING, sampler.ALONE, *sampler.SLOWER, sampler.EAGER}
    ours = [error for name, error in errors.items() if name != sampler.EAGER]
    assert all(0 < value <= 1e-3 for error in ours for value in (error["ends"], error["targets"]))
    assert [row["ratio"] is None for row in content["rows"]] == [False, True, False, False]


def test_the_table_promises_what_the_scripts_claim(tmp_path: Path) -> None:
    """Claim, peer and bar of each row, before anything is measured."""
    setting = train_step.Setting(SIZES["gpu"], tmp_path, 0, "cuda", 1)
    details: dict[str, Any] = {}
    made: dict[str, list[Claim]] = {
        "train_step": [
            *train_step.claims_of_peers({}, {}, setting, details),
            *train_step.claims_of_distillation({}, {}, setting, details),
        ],
        "zero": train_step.claims_of_zero({}, {}, setting, details),
        "sampler": sampler.claims({}, {}),
    }
    signs = {"at least": "≥", "at most": "≤"}
    for benchmark in BENCHMARKS:
        if benchmark.result in made:
            promised = [(promise.claim, promise.bar, promise.peer) for promise in benchmark.promises]
            claimed = [(row.claim, f"{signs[row.bound]} {row.bar:g}", row.against) for row in made[benchmark.result]]
            assert promised == claimed


def test_a_speed_below_the_bar_is_an_exit_code(tmp_path: Path) -> None:
    """The sampler's rows on made-up rates, as a GPU would give them."""
    fast = {sampler.WRITING: [5500.0], sampler.ALONE: [5600.0], sampler.COMPILED: [4166.0], sampler.EAGER: [2280.0]}
    assert [row.holds(cuda=True) for row in sampler.claims(fast, {})] == [True] * 4
    slow = fast | {sampler.WRITING: [4900.0]}
    assert [row.holds(cuda=True) for row in sampler.claims(slow, {})] == [False, True, True, False]


def test_gpu_goes_on_where_a_job_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = {
        "good": "import json, sys; row = dict(claim='fast', ratio=2.0, bar=1.25, bound='at least', holds=True);"
        "json.dump({'rows': [row]}, open(sys.argv[-1], 'w'))",
        "bad": "raise SystemExit('broken beyond repair')",
        "slow": "import time; time.sleep(60)",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setattr(gpu, "BENCHMARKS", tmp_path)
    jobs = {
        name: Job(f"{name}.py", (), 1.5 if name == "slow" else 30.0, paced=False) for name in ("bad", "slow", "good")
    }
    monkeypatch.setattr(gpu, "JOBS", jobs)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    printed = capsys.readouterr().out
    assert "slow: killed after 2 s" in printed and "broken beyond repair" in printed
    assert "yes       2.0 at least 1.25  fast" in printed
    assert len(list((tmp_path / "out").iterdir())) <= 8, "what comes back from a lent machine"
    assert gpu.main(["--out", str(tmp_path / "out"), "good"]) == 0
    capsys.readouterr()
    assert gpu.main(["--out", str(tmp_path / "out"), "--minutes", "0.1", "good"]) == 1
    assert "good: no time was left" in capsys.readouterr().out


def test_every_job_is_a_script_that_takes_its_arguments() -> None:
    for name in ("train_step", "zero"):
        job = JOBS[name]
        arguments = command(name, job, Path("out"), 300.0)[2:]
        options = train_step.parse(arguments)
        assert options.json == Path("out") / f"{name}.json" and 0 < options.minutes < 5
    assert set(JOBS["train_step"].arguments[1].split(",")) | {JOBS["zero"].arguments[1]} == set(train_step.PARTS)
    assert summary("kernels", "no time was left", Path("nowhere")) == ["--- kernels: no time was left"]


@pytest.mark.parametrize(
    "arguments", [["--parts", "peers,all"], ["--ranks", "2"], ["--ranks", "2", "--parts", "peers"]]
)
def test_wrong_arguments_are_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train_step.parse(arguments)
    assert ended.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_stages_that_differ_are_named_all_at_once() -> None:
    right = {"losses": [1.0, 1.1, 1.2], "grad_norms": [2.0, 2.0, 2.0]}
    race: Any = SimpleNamespace(warm=dict.fromkeys(("plain", "zero-1", "zero-2", "zero-3", "reference"), right))
    names = ["plain", "zero-1", "reference", "zero-2", "zero-3"]
    errors = train_step.check_zero(race, names, SIZES["quick"])
    assert errors.keys() == set(names) - {"reference"}
    race.warm |= {"zero-2": right | {"losses": [1.0, 1.1, 1.21]}, "zero-3": right | {"grad_norms": [2.0, 2.0, 2.1]}}
    with pytest.raises(WrongResult, match=r"zero-2: losses.*; zero-3: gradient norms"):
        train_step.check_zero(race, names, SIZES["quick"])


def test_a_wrong_part_keeps_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(part: str, race: Any, setting: Any, report: Report) -> None:
        if part == "peers":
            raise WrongResult("2 where 1 is right")
        report.add(Claim(part, "ms", 1.0, [0.5]))

    monkeypatch.setattr(train_step, "run_part", run_part)
    with pytest.raises(SystemExit) as ended:
        train_step.main(["--quick", "--parts", "peers,zero", "--json", str(tmp_path / "x.json")])
    assert ended.value.code == 2
    assert "wrong result: 2 where 1 is right" in capsys.readouterr().err
    content = read(tmp_path / "x.json")
    assert [row["claim"] for row in content["rows"]] == ["zero"] and content["wrong"] == ["2 where 1 is right"]
