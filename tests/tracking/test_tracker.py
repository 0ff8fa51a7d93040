"""The tracker writes the log always, and wandb, offline, under one id over restarts."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config import Config, Wandb
from trainer.errors import UserError
from trainer.run import RunDir
from trainer.stop import Stopped
from trainer.tracking.log import read_log
from trainer.tracking.tracker import Tracker, WandbRun, open_tracker, open_wandb


def config(wandb: Wandb = Wandb.off, progress: bool = False) -> Config:
    made = Config()
    made.tracking.wandb, made.tracking.progress, made.train.images_per_task = wandb, progress, 100
    return made


def test_log_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir(tmp_path)
    with open_tracker(run, config(progress=True), [100, 100]) as tracker:
        tracker.start_task(1)
        tracker.log({"task": 1, "seen": 64, "loss": 0.5})
        tracker.log({"task": 1, "seen": 100, "fd": 3.0, "accuracy": None}, event="evaluation")
        tracker.activity("sampling")
        tracker.note("done")
        tracker.image("samples", tmp_path / "none.png")  # without wandb nothing to do
    lines = list(read_log(run.metrics_log))
    assert [(line["event"], line["seen"]) for line in lines] == [("task", 0), ("train", 64), ("evaluation", 100)]
    assert lines[2]["fd"] == 3.0 and lines[2]["accuracy"] is None
    out = capsys.readouterr().out
    assert "task 1/2  64/100 images (64 %)  loss 0.5" in out and "task 1/2  sampling" in out and "done" in out


def test_other_ranks_are_silent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Tracker() as tracker:
        tracker.start_task(1)
        tracker.log({"task": 1, "seen": 1, "loss": 1.0})
        tracker.samples("x", np.zeros((1, 1, 8, 8), dtype=np.uint8), ["0"])
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_wandb_is_not_imported_while_it_is_off(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from trainer.config import Config; from trainer.run import RunDir\n"
        "from trainer.tracking.tracker import open_tracker\n"
        f"open_tracker(RunDir(Path({str(tmp_path)!r})), Config(), [1]).finish()\n"
        "assert 'wandb' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


@pytest.fixture
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-home"))


@pytest.mark.usefixtures("no_login")
def test_offline_wandb_goes_on_under_the_same_id(tmp_path: Path) -> None:
    run, made = RunDir(tmp_path / "run"), config(Wandb.offline)
    made.tracking.wandb_samples = 2
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    singles = np.repeat(np.arange(3, dtype=np.uint8), 64).reshape(3, 1, 8, 8)
    for attempt in range(2):
        with open_tracker(run, made, [100]) as tracker:
            tracker.log({"task": 1, "seen": 50 + attempt, "loss": 0.5})
            tracker.image("samples", tmp_path / "grid.png")
            tracker.samples("singles", singles, ["0", "1", "2"])
    number = run.wandb_id.read_text().strip()
    files = sorted((run.root / "wandb").glob(f"offline-run-*-{number}/run-{number}.wandb"))
    assert files and all(path.stat().st_size > 200 for path in files)
    assert list((run.root / "wandb").glob(f"offline-run-*-{number}/files/media/images/samples*.png"))
    logged = {
        path.name for path in (run.root / "wandb").glob(f"offline-run-*-{number}/files/media/images/singles*.png")
    }
    assert len({name.rpartition("_")[2] for name in logged}) == 2  # contents; tracking.wandb_samples = 2 of the 3


@pytest.mark.usefixtures("no_login")
def test_online_wandb_without_login_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tracking\.wandb=online: .*tracking\.wandb=offline") as caught:
        open_wandb(RunDir(tmp_path / "run"), config(Wandb.online))
    assert "\n" not in str(caught.value)


class Finished:
    """A run of wandb that remembers how it was ended."""

    exit_code: int | None = None

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        """Nothing is logged here."""

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.mark.parametrize(
    ("raised", "code"), [(None, 0), (Stopped(2, 640), 0), (UserError("starved"), 1), (KeyboardInterrupt(), 1)]
)
def test_a_run_that_was_asked_to_stop_has_not_failed(
    monkeypatch: pytest.MonkeyPatch, raised: BaseException | None, code: int
) -> None:
    monkeypatch.setattr("wandb.teardown", lambda exit_code: None)
    run = Finished()
    with suppress(UserError, Stopped, KeyboardInterrupt), Tracker(wandb=WandbRun(run, 1)):  # pyright: ignore[reportArgumentType]
        if raised is not None:
            raise raised
    assert run.exit_code == code
