"""The final table: its numbers, and that it fits."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainer.tracking.table import plain_result, print_result

MakeResult = Callable[..., dict[str, Any]]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def rows(text: str) -> list[list[str]]:
    return [cells(line) for line in text.splitlines() if line.startswith("|")]


def test_numbers_stand_where_they_belong(make_result: MakeResult) -> None:
    text = plain_result(make_result(3), {"samples": Path("runs/a/samples.png")}, width=80)
    assert text.splitlines()[0] == "finetune, seed 4: 2,000 samples against test images"
    assert rows(text) == [
        ["after", "FD", "KLD", "accuracy", "FD t1", "FD t2", "FD t3"],
        ["task 1", "101.0", "0.010", "98.0 %", "10.0", "", ""],
        ["task 2", "102.0", "0.020", "96.0 %", "11.0", "20.0", ""],
        ["task 3", "103.0", "0.030", "94.0 %", "12.0", "21.0", "30.0"],
    ]
    assert "FD forgetting 1.5   accuracy forgetting 3.0 %" in text
    assert "teacher evaluations 123,456   replay points used 64,000" in text
    assert "wall time 1:02:05   training 1:15   1,234 images/s   starved 3.2 s" in text
    assert text.endswith("samples  runs/a/samples.png\n")


def test_unconditional_run_has_no_accuracy_and_names_lost_tasks(make_result: MakeResult) -> None:
    text = plain_result(make_result(5, conditional=False))
    assert rows(text)[0][:4] == ["after", "FD", "KLD", "FD t1"]
    assert rows(text)[-1][3:] == ["--", "--", "32.0", "41.0", "50.0"]
    assert "nothing generated of task 1, 2" in text and "accuracy" not in text


def test_a_model_that_classifies_and_its_probes_have_rows(make_result: MakeResult) -> None:
    """Three tasks: 0.8, 0.9 and 1.0 at the end, 1.0 each when learnt."""
    text = plain_result(make_result(3, conditional=False, classifying=True))
    found = {row[0]: row[1:] for row in rows(text)}
    assert found["model accuracy"] == ["90.0 %", "", "3,000 images", "own classifier; 15.0 % forgotten"]
    assert found["average accuracy"][0] == "90.0 %" and found["backward transfer"][0] == "-15.0 %"
    assert found["linear probe"] == ["87.5 %", "", "1,200 images", "of features; best of 2 levels: t = 50"]
    assert "k-NN probe" not in found and max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize(("tasks", "width", "every"), [(5, 80, True), (6, 80, False), (10, 120, True), (20, 99, False)])
def test_wide_tables_are_shortened(make_result: MakeResult, tasks: int, width: int, every: bool) -> None:
    text = plain_result(make_result(tasks), width=width)
    assert max(map(len, text.splitlines())) <= width
    last = rows(text)[-1]
    if every:
        assert len(last) == 4 + tasks
    else:
        assert rows(text)[0][4:] == ["FD first", "FD worst", "FD newest"]
        assert last[4:] == [f"{10.0 + tasks - 1:.1f}", f"{10.0 * tasks:.1f}", f"{10.0 * tasks:.1f}"]


def test_terminal_and_pipe(make_result: MakeResult) -> None:
    pipe, terminal = io.StringIO(), io.StringIO()
    print_result(make_result(2), console=Console(file=pipe, force_terminal=False, width=90))
    print_result(make_result(2), console=Console(file=terminal, force_terminal=True, width=90))
    assert pipe.getvalue().isascii() and "\x1b" not in pipe.getvalue() and "| task 2 |" in pipe.getvalue()
    assert "\x1b[" in terminal.getvalue() and "╭" in terminal.getvalue()
