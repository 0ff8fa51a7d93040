"""One object that the loop tells what happens; it writes the log, moves the bar and feeds wandb."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from trainer.config import Config, Wandb
from trainer.data.shards import write_atomic
from trainer.errors import UserError
from trainer.run import RunDir
from trainer.stop import Stopped
from trainer.tracking.log import MetricsLog
from trainer.tracking.progress import TrainingProgress

if TYPE_CHECKING:
    from wandb import Run

INIT_TIMEOUT = 60.0  # seconds that wandb may take to answer at the start


class Tracker:
    """Everything a person sees while a run goes on. A context manager, which `Stopped` leaves without a failure;
    `finish` may be called twice.

    Made by `open_tracker` on the main rank; `Tracker()` is silent, for the other ranks.
    """

    def __init__(
        self,
        log: MetricsLog | None = None,
        progress: TrainingProgress | None = None,
        wandb: WandbRun | None = None,
        images: Sequence[int] = (),
    ) -> None:
        """`images`: how many each task sees."""
        self._log, self._progress, self._wandb = log, progress, wandb
        self._images = images

    def start_task(self, task: int, seen: int = 0, machine: Mapping[str, Any] | None = None) -> None:
        """Task `task` (from 1) begins, or goes on at `seen` images of it; `machine`: on what, for the log."""
        if self._log:
            self._log.append("task", {"task": task, "seen": seen, **(machine or {})})
        if self._progress:
            self._progress.start_task(task, seen)

    def log(self, metrics: Mapping[str, Any], event: str = "train") -> None:
        """One line of metrics.jsonl. `metrics` are Python values; those of "train" hold "task" and "seen" images."""
        if self._log:
            self._log.append(event, metrics)
        if self._progress and event == "train":
            self._progress.update(metrics["seen"], metrics)
        if self._wandb:
            numbers = {f"{event}/{k}": v for k, v in metrics.items() if isinstance(v, int | float)}
            if "task" in metrics and "seen" in metrics:
                numbers["seen_images"] = sum(self._images[: metrics["task"] - 1]) + metrics["seen"]
            self._wandb.log(numbers)

    def activity(self, text: str) -> None:
        """Say on the screen what is going on besides training."""
        if self._progress:
            self._progress.activity(text)

    def note(self, text: str) -> None:
        """A line on the screen that stays."""
        if self._progress:
            self._progress.note(text)

    def image(self, name: str, path: Path) -> None:
        """Show a picture that was written to the run directory."""
        if self._wandb:
            self._wandb.image(name, path)

    def samples(self, name: str, images: NDArray[np.uint8], captions: Sequence[str]) -> None:
        """Show single samples (n, C, H, W), `tracking.wandb_samples` at most, with a caption each."""
        if self._wandb:
            self._wandb.samples(name, images, captions)

    def finish(self, failed: bool = False) -> None:
        """Close everything; the terminal is as it was."""
        if self._progress:
            self._progress.stop()
        if self._log:
            self._log.close()
        if self._wandb:
            self._wandb.finish(failed)
        self._log = self._progress = self._wandb = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(failed=kind is not None and not issubclass(kind, Stopped))


class WandbRun:
    """A run of Weights & Biases that goes on under the same id when the run directory is resumed."""

    def __init__(self, run: Run, samples: int) -> None:
        self._run, self._samples = run, samples
        run.define_metric("seen_images")
        run.define_metric("*", step_metric="seen_images")

    def log(self, values: Mapping[str, float]) -> None:
        self._run.log(dict(values))

    def image(self, name: str, path: Path) -> None:
        import wandb

        self._run.log({name: wandb.Image(str(path))})

    def samples(self, name: str, images: NDArray[np.uint8], captions: Sequence[str]) -> None:
        import wandb

        shown = images[: self._samples].transpose(0, 2, 3, 1)
        pictures = [
            wandb.Image(image.squeeze(-1) if image.shape[-1] == 1 else image, caption=caption)
            for image, caption in zip(shown, captions, strict=False)
        ]
        self._run.log({name: pictures})

    def finish(self, failed: bool) -> None:
        import wandb

        self._run.finish(exit_code=int(failed))
        wandb.teardown(exit_code=int(failed))  # waits for wandb's own process: finish alone may leave it still writing


def open_tracker(run: RunDir, config: Config, images: Sequence[int]) -> Tracker:
    """The tracker of the main rank: metrics.jsonl always, the bar and wandb as configured.

    Args: images: how many each task sees.

    Raises:
        UserError: wandb cannot be started, before any work.
    """
    wandb = None if config.tracking.wandb is Wandb.off else open_wandb(run, config)
    progress = TrainingProgress(images) if config.tracking.progress else None
    return Tracker(MetricsLog(run.metrics_log), progress, wandb, images)


def open_wandb(run: RunDir, config: Config) -> WandbRun:
    """Start wandb, or go on with the id kept in the run directory; nothing is asked and nothing hangs.

    Offline, each attempt leaves its own folder under `<run>/wandb`, all with one id: `wandb sync --append` joins them.

    Raises:
        UserError: not logged in, or no answer within INIT_TIMEOUT seconds.
    """
    import wandb
    from wandb.errors import Error

    online = config.tracking.wandb is Wandb.online
    advice = "use tracking.wandb=offline, or off"
    settings = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True))
    try:
        if online and not wandb.login(prompt=False, verify=False):
            raise UserError(f"tracking.wandb=online: not logged in (wandb login); {advice}")
        started = wandb.init(
            project=config.tracking.project,
            id=_wandb_id(run.wandb_id),
            name=run.root.resolve().name,
            dir=str(run.root),
            config=settings,
            mode="online" if online else "offline",
            resume="allow" if online else None,  # offline wandb ignores it, with a warning
            settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT),
        )
    except (Error, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise UserError(f"tracking.wandb={config.tracking.wandb.value}: {line}; {advice}") from None
    return WandbRun(started, config.tracking.wandb_samples)


def _wandb_id(path: Path) -> str:
    """The id kept in the run directory, made at the first attempt."""
    if not path.exists():
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text().strip()
