"""One run under attack, from its first start to its result."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

from attack.kinds import Deck
from attack.scene import Fault, Scene
from trainer.run import RunDir

LOOK_SECONDS = 0.1
ORPHAN_SECONDS = 75.0  # for all of a job to be gone once its command has ended; a rank may take 60 to save
EARLY = 0.25  # of the starts may meet a fault before the run goes on from where it stood
MARGIN, MARGIN_SECONDS = 1.6, 10.0  # kept for what is left of the run: it takes longer than undisturbed
FRUITLESS = 4  # starts in a row that end by themselves, without a result and without a fault since the first


class Lost(Exception):
    """The run cannot be completed, or not in time."""


class Round:
    """Injects faults at random moments and gives the command again and again until the run is complete."""

    def __init__(
        self,
        scene: Scene,
        deck: Deck,
        chance: random.Random,
        tell: Callable[[str, float], None],
        pause: float,
        needed: float,
        deadline: float,
        most: int,
    ) -> None:
        """`pause`: mean seconds between two faults; `needed`: seconds that the whole run takes undisturbed;
        `deadline`: when (monotonic) it has to be complete; `most`: faults at most."""
        self.scene, self.deck, self.chance, self.tell = scene, deck, chance, tell
        self.pause, self.needed, self.deadline, self.most = pause, needed, deadline, most
        self.faults: list[Fault] = []
        self.open: list[Fault] = []
        self._fruitless = 0
        self._tried_without_room = False
        self._next = self._ended = 0.0
        self._held: int | None = None  # progress at the start, until it grows

    def play(self) -> None:
        """Returns with the run complete and its last command ended.

        Raises:
            Lost: it is not, and will not be.
        """
        self._start()
        while True:
            if time.monotonic() > self.deadline:
                raise Lost(f"{self.scene.run.root}: not complete in time, see {self.scene.job.log()}")
            self.scene.look()
            if self._job_over():
                self._settle()
                if complete(self.scene.run, self.scene.tasks):
                    break
                self._between()
                self._await_room()
                self._start()
            elif self._due():
                self._inject(up=True)
            self._settle()
            time.sleep(LOOK_SECONDS)
        self._close()

    def _start(self) -> None:
        # Some starts are struck before they get anywhere, most once they learn: else nothing would ever be learnt.
        self._held = None if self.chance.random() < EARLY else self._progress()
        self.scene.job.start()
        self._wait()

    def _wait(self) -> None:
        self._next = time.monotonic() + self.chance.uniform(0.2, 1.8) * self.pause

    def _due(self) -> bool:
        """Whether it is time for a fault."""
        if self._held is not None and self._progress() > self._held:
            self._held = None
            self._wait()
        return self._held is None and time.monotonic() > self._next

    def _progress(self) -> int:
        """Lines about steps in the log: it grows while the run learns."""
        log = self.scene.run.metrics_log
        return log.read_bytes().count(b'"event": "train"') if log.exists() else 0

    def _job_over(self) -> bool:
        """Whether the command has ended and nothing of it is left; what is left for long is an orphan."""
        job = self.scene.job
        if job.code is None:
            self._ended = time.monotonic()
            return False
        orphans = job.members()
        if orphans and time.monotonic() - self._ended > ORPHAN_SECONDS:
            names = ", ".join(f"{process.pid} ({' '.join(process.cmdline()[:4])})" for process in orphans)
            self.scene.lost.append(f"orphans after the command of {job.log()} had ended: {names}")
            job.kill()
        return not orphans

    def _between(self) -> None:
        """The job is down and unfinished: perhaps a fault at rest."""
        job = self.scene.job
        since = [fault for fault in self.faults if fault.at > job.began]
        self._fruitless = 0 if since or self.scene.ballast_until else self._fruitless + 1
        if not any(fault.ends for fault in since):
            self.tell(f"start {job.starts} ended by itself, code {job.code}{job.last_word()}", job.began)
        if self._fruitless >= FRUITLESS:
            raise Lost(f"{self.scene.run.root}: does not go on, see {job.log()}{job.last_word()}")
        self._inject(up=False)

    def _await_room(self) -> None:
        """One start may find the disk full; a person would not go on trying."""
        while self.scene.ballast_until and self._tried_without_room:
            self.scene.look()
            time.sleep(LOOK_SECONDS)
        self._tried_without_room = self.scene.ballast_until > 0

    def _inject(self, *, up: bool) -> None:
        self._wait()
        if self._calm() or len(self.faults) >= self.most or any(fault.ends for fault in self.open):
            return
        fault = self.deck.deal(self.scene, up=up, gentle=any(fault.spares for fault in self.open))
        if fault is not None:
            self.faults.append(fault)
            self.open.append(fault)

    def _calm(self) -> bool:
        """Whether the time that is left is for what is left of the run."""
        tasks, run = self.scene.tasks, self.scene.run
        left = tasks - sum((run.teacher(task) / "card.json").exists() for task in range(1, tasks + 1))
        return time.monotonic() + MARGIN * self.needed * (1 + left) / (1 + tasks) + MARGIN_SECONDS > self.deadline

    def _settle(self) -> None:
        """Tell what followed from the faults of which that is known now."""
        for fault in list(self.open):
            followed = fault.followed()
            if followed is not None:
                self._tell(fault, followed)

    def _close(self) -> None:
        """The run is complete: nothing more can follow."""
        for fault in list(self.open):
            if fault.must:
                self.scene.lost.append(f"{fault.kind}, {fault.victim}: {fault.must}")
            self._tell(fault, fault.must or "no trace of it until the run was complete")

    def _tell(self, fault: Fault, followed: str) -> None:
        self.open.remove(fault)
        self.tell(f"{fault.kind:<24} {fault.victim:<48} -> {followed}", fault.at)


def complete(run: RunDir, tasks: int) -> bool:
    """Whether the result of all tasks is there."""
    try:
        content = json.loads(run.metrics.read_bytes())
    except (OSError, ValueError):
        return False
    return content.get("tasks") == tasks and "final" in content
