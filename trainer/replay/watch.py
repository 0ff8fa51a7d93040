"""The main rank's look at a replay pool: it alone reads the manifest, and names to all ranks what is there."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from trainer.data.shards import FULL_DISK
from trainer.errors import UserError, say
from trainer.replay.events import Event, EventLog
from trainer.replay.manifest import Manifest, ShardLine
from trainer.replay.reader import Offer
from trainer.replay.request import ReplayRequest
from trainer.replay.state import read_json, writer_lives
from trainer.replay.transport import open_pool
from trainer.run import RunDir
from trainer.store import Outage

REMADE = 10  # times that one shard may be found bad before the run ends


class PoolWatch:
    """Turns published shards into offers; refuses what another request made; asks again for what is bad."""

    def __init__(
        self, run: RunDir, request: ReplayRequest, notice: Callable[[str], None] = say, outage: Outage | None = None
    ) -> None:
        self.run, self.request, self.notice = run, request, notice
        self.pool = open_pool(run, request, outage=outage)
        self.manifest = Manifest(self.pool.open_journal())
        self.events = EventLog(run, "trainer")
        self._outages: list[float] = []  # seconds of those that have ended, until they are written down
        if outage is not None:
            outage.ended = self._outages.append
        self.news = time.monotonic()  # when something was published last
        self._offered: dict[int, tuple[str, int]] = {}  # shard -> id of the publication and serial
        self._serial = 0
        self._sampler = request.sampler()
        self._checked: set[str] = set()  # ids of publications
        self._bad = Counter[int]()
        self._redo: dict[str, tuple[int, str]] = {}  # ids to be taken back -> shard, reason

    def refresh(self) -> None:
        """Look for new shards. Raises UserError for a manifest that this program cannot read."""
        if self.manifest.refresh():
            self.news = time.monotonic()
            for line in [line for line in self.manifest.shards.values() if line.id not in self._checked]:
                self._checked.add(line.id)
                difference = self._difference(line)
                if difference:
                    self._refuse(line, Event.foreign_shard, difference)
        while self._outages:
            self.events.add(Event.store_away, task=self.request.task, seconds=self._outages.pop(0))
        self._write_redo()

    def offers(self, first: int, count: int) -> list[Offer]:
        """At most `count` shards from `first` on that were not offered yet, in order."""
        new: list[Offer] = []
        for shard in sorted(shard for shard in self.manifest.shards if shard >= first):
            line = self.manifest.shards[shard]
            if len(new) == count:
                break
            if line.id in self._redo or self._offered.get(shard, ("", 0))[0] == line.id:
                continue
            self._serial += 1
            self._offered[shard] = line.id, self._serial
            new.append(Offer(shard, line.bytes, line.crc32, self._serial))
        return new

    def complain(self, shard: int, serial: int, reason: str) -> None:
        """A rank found an offered shard to be something else: have it made again. Repeated complaints count once.

        Raises:
            UserError: that has happened too often.
        """
        line = self.manifest.shards.get(shard)
        known, offered = self._offered.get(shard, ("", 0))
        if offered != serial or line is None or line.id != known:
            return
        self._refuse(line, Event.corrupt_shard, reason)
        self._write_redo()

    def _difference(self, line: ShardLine) -> str:
        """What of a published shard is not of this request; empty for one that is."""
        request = self.request
        if line.teacher_id != request.teacher_id:
            return f"made by teacher {line.teacher_id[:12]}, this run's teacher is {request.teacher_id[:12]}"
        for key, wanted in self._sampler.items():
            if line.sampler.get(key) != wanted:
                return f"sampled with {key}={line.sampler.get(key)}, this run asks for {wanted}"
        if not 0 < line.bytes <= request.shard_bytes or line.count != request.shard_trajectories:
            return f"{line.count} trajectories in {line.bytes} bytes are not one shard"
        return ""

    def _refuse(self, line: ShardLine, kind: Event, reason: str) -> None:
        if line.id in self._redo:
            return
        shard, path = line.shard, self.pool.place(line.shard)
        self.notice(f"{path}: {kind.value.replace('_', ' ')} ({reason}); asked for again")
        self.events.add(kind, task=self.request.task, shard=shard, reason=reason)
        self._offered.pop(shard, None)
        self._redo[line.id] = shard, reason
        self._bad[shard] += 1
        if self._bad[shard] > REMADE:
            where = "store" if self.request.store else "disk"
            raise UserError(f"{path}: bad for the {self._bad[shard]}th time ({reason}); is the {where} sound?")

    def _write_redo(self) -> None:
        """Take publications back; where the disk is full, at a later call."""
        try:
            for publication, (shard, reason) in list(self._redo.items()):
                line = self.manifest.shards.get(shard)
                if line is not None and line.id == publication:
                    self.manifest.redo(shard, publication, reason)
                    self.manifest.refresh()
                del self._redo[publication]
            self.events.flush()
        except OSError as error:
            if error.errno not in FULL_DISK:
                raise


def given_up(run: RunDir) -> str:
    """What a living supervisor said when it gave its sampler up; empty while none did."""
    for path in sorted(run.supervisor(0).parent.glob("supervisor-*.json")):
        status = read_json(path)
        if status.get("given_up") and writer_lives(status):
            return str(status["given_up"])
    return ""


def describe_samplers(run: RunDir) -> str:
    """The samplers' heartbeats in a few words."""
    words: list[str] = []
    for path in sorted(run.sampler(0).parent.glob("sampler-*.json")):
        beat = read_json(path)
        if beat:
            heard = beat.get("time")
            age = f"{max(0.0, time.time() - heard):.0f} s ago" if isinstance(heard, float) else "at an unknown time"
            words.append(f"{path.stem}: {beat.get('status', '?')}, last heard of {age}")
    return "; ".join(words) or "none was ever heard of"
