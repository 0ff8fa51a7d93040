"""The benchmark of the kernels from end to end at tiny sizes, and its refusal of a wrong result."""

from __future__ import annotations

import json
from pathlib import Path

import kernels
import pytest
import torch
from claims import WrongResult

CPU = torch.device("cpu")
SHAPE = (2, 5, 3)


def test_every_kernel_is_checked_and_claimed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernels.main(["--quick", "--json", str(tmp_path / "kernels.json")]) == 0
    content = json.loads((tmp_path / "kernels.json").read_text())
    assert content["command"].startswith("python benchmarks/kernels.py --quick")
    assert len(content["tasks"]) == 6 and len(content["rows"]) == 8
    for task in content["tasks"]:
        found = task["contenders"]
        assert found.keys() >= {"eager", "ours", "copy"} and found["copy"]["share_of_copy"] == pytest.approx(1.0)
        assert all(0 <= row["error_over_allowed"] <= 1 for name, row in found.items() if name != "copy")
    if not torch.cuda.is_available():
        assert all(row["holds"] is None and row["why_not"] == "needs CUDA" for row in content["rows"])
        assert "needs CUDA" in capsys.readouterr().out


@pytest.mark.parametrize(
    "task",
    [
        kernels.noise_task(SHAPE, bf16=True),
        kernels.noise_task(SHAPE, bf16=False),
        kernels.ddim_task(SHAPE, "guided", guidance=2.0, noisy=True),
        kernels.loss_task(SHAPE),
    ],
    ids=lambda task: task.name,
)
def test_a_small_error_is_found(task: kernels.Task) -> None:
    """Three per cent in one element of the last result: more than bf16 may round."""
    given = task.inputs(4, CPU)

    def spoilt(**arguments: object) -> tuple[torch.Tensor, ...]:
        found = [part.clone() for part in task.ours(**arguments) if part is not None]
        place = found[-1].view(-1).abs().argmax()
        found[-1].view(-1)[place] *= 1.03
        return (*found, None)[: max(2, len(found))]  # type: ignore[return-value]

    assert set(kernels.check(task, {"ours": task.ours}, given)) == {"ours"}
    with pytest.raises(WrongResult, match=f"{task.name}, spoilt"):
        kernels.check(task, {"spoilt": spoilt}, given)
