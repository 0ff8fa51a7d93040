"""Replay from a pool that samplers fill while the trainer learns.

Only the main rank reads the manifest. What it finds, and what each rank has in memory, travels in the small exchange
that all ranks have with each other every few steps (`trainer.pulse`): a step begins when every rank holds its points.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.config import OnStarved
from trainer.data.batch import Examples
from trainer.data.shards import FULL_DISK
from trainer.diffusion.schedules import NoiseSchedule
from trainer.errors import ToldElsewhere, UserError, say
from trainer.pulse import LONGEST_INTERVAL, Ranks
from trainer.replay.points import StoredPoints, to_examples
from trainer.replay.reader import BadShard, Loader, Offer
from trainer.replay.request import ReplayRequest
from trainer.replay.reuse import ReuseBudget
from trainer.replay.state import write_json
from trainer.replay.transport import MakeCache, open_pool, pool_url
from trainer.replay.watch import PoolWatch, describe_samplers, given_up
from trainer.run import RunDir
from trainer.store import Outage

Journal = Callable[[dict[str, Any]], None]
COUNTERS = ("points_used", "starved_seconds", "starved_steps", "reused_steps", "real_only_steps")
# A rank's words: steps before this are loaded; a shard found bad, and its offer's serial; how a substitute stands;
# how many offers follow (the main rank's alone), each of OFFER words.
READY, BAD_SHARD, BAD_SERIAL, SUBSTITUTE, OFFERS, HEAD = range(6)
OFFER = 4
NONE, PENDING, THERE, FAILED = range(4)  # of a substitute


class PoolSource:
    """This rank's share of each step's replay points, from the shards of `run.replay(request.task)`.

    Position p of the training sequence names its shard and record, so all ranks use the same points. Where a shard is
    late, `on_starved` decides for all ranks at once, by what they have told each other.
    """

    def __init__(
        self,
        run: RunDir,
        request: ReplayRequest,
        *,
        batch: int,
        world: Ranks,
        schedule: NoiseSchedule,
        device: torch.device,
        dtype: torch.dtype,
        on_starved: OnStarved,
        timeout: float,
        reuse_cap: int,
        start_step: int = 0,
        prefetch: int = 4,
        restored: Mapping[str, Any] | None = None,
        journal: Journal | None = None,
        cache: MakeCache | None = None,
    ) -> None:
        """`batch` is over all ranks; `restored` are the counters of `stats` at `start_step`; `journal` gets what was
        done in place of a step's own replay; `cache` makes what shards from a store are kept in."""
        assert batch % world.size == 0, "checked before the run starts"
        self.run, self.request, self.batch, self.world = run, request, batch, world
        self.schedule, self.device, self.dtype = schedule.to(device), device, dtype
        self.on_starved, self.timeout, self.journal = on_starved, timeout, journal
        self.stop_step = request.positions // batch
        self.counters = {name: (restored or {}).get(name, 0) for name in COUNTERS}
        self.step = start_step
        outage = Outage(say if world.rank == 0 else lambda text: None)
        self.watch = PoolWatch(run, request, outage=outage) if world.rank == 0 else None
        # A listing of a store takes its time, and must not wait for a shard that is being fetched.
        self._watching = ThreadPoolExecutor(1, "replay-watch") if request.store and self.watch is not None else None
        self._pool_stats: dict[str, Any] = {}
        self.loader = Loader(
            open_pool(run, request, cache=cache, outage=outage),
            request,
            self._positions,
            depth=2 * LONGEST_INTERVAL + prefetch,
            pin=device.type == "cuda",
        )
        self._offered: dict[int, int] = {}  # shards that no rank has found bad, and their serials: the same everywhere
        self._budget = ReuseBudget(request, reuse_cap, (restored or {}).get("reused_points"))
        self._substitute: Future[StoredPoints] | None = None  # for the points of a starved step
        self._replaced: StoredPoints | None = None
        self._replaced_step = -1
        self._begun = False  # a step has had its replay
        self._missing_since: float | None = None  # by time.monotonic(): a shard that is needed is not there
        self._released = self._releasable(start_step)
        self._told: dict[str, Any] = {}  # to the samplers, last
        self._telling: Future[None] | None = None
        self._looking: Future[None] | None = None
        self._failure: UserError | None = None  # on this rank; the others learn of it in the next exchange
        if self.watch is not None:
            self._looking = self._look_again()
        self._tell_samplers()

    # --- agreeing ------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """How many words `words` gives."""
        shards_per_step = -(-self.batch // self.request.shard_uses) + 1
        return HEAD + OFFER * min(max(8, 2 * shards_per_step), 512)

    def words(self, step: int) -> list[int]:
        """What this rank has to tell the others before a step.

        Raises:
            UserError: the pool is of no use, or nothing will come any more.
        """
        self.step = step
        offers = self._look(step)
        ready, substitute = self.loader.ready_until(step), self._substitute_state()
        bad = self.loader.found_bad[0] if self.loader.found_bad else None
        head = [0] * HEAD
        head[READY] = ready
        head[BAD_SHARD], head[BAD_SERIAL] = (bad.offer.shard, bad.offer.serial) if bad else (-1, -1)
        head[SUBSTITUTE] = substitute
        head[OFFERS] = len(offers)
        words = head + [word for offer in offers for word in (offer.shard, offer.bytes, offer.crc32, offer.serial)]
        return words + [0] * (self.width - len(words))

    def heed(self, step: int, rows: Sequence[Sequence[int]]) -> int:
        """Take in what all ranks told; the first step that cannot begin yet, `step` where not even this one can.

        Raises:
            UserError: starved, and the policy says that the run ends (ToldElsewhere on the ranks but the main one).
        """
        self._take_complaints(rows)
        self._take_offers(rows[0])
        self.loader.advance(step, self.stop_step)
        ready = min(row[READY] for row in rows)
        if ready > step:
            self._fed()
            self._substitute = None  # the step's own points came after all
            return ready
        return step + 1 if self._starving(step, rows) else step

    def wait(self, step: int, seconds: float) -> None:
        """Let some time pass before the next exchange, less where the step's points arrive."""
        self.loader.wait(step, seconds)

    def points(self, step: int, current: Examples | None = None) -> Examples | None:
        """Training pairs of this rank for a step that may begin; None where the step goes without."""
        if step == self._replaced_step:
            stored, self._replaced = self._replaced, None
            if stored is None:
                return None
        else:
            stored = self.loader.take(step)
            self._budget.used(self._shards_of(step)[1])
            self._begun = True
        self.step = step
        self.counters["points_used"] += self.batch
        return to_examples(self.request, stored, self.schedule, self.device, self.dtype)

    def release(self, step: int) -> None:
        """A checkpoint after `step` steps is published: earlier points are not needed again. For the main rank."""
        self._released = self._releasable(step)

    def stats(self) -> dict[str, Any]:
        """Counts since the beginning of the task: points and seconds over the attempts whose counters were restored;
        on the main rank also the evaluations of all attempts (from the manifest) and the fill of the pool."""
        counts = {**self.counters, "reused_points": self._budget.state()}
        if self.watch is None:
            return counts
        if self._pool_stats and not self._is_seen():
            return counts | self._pool_stats  # as of the last look: no step waits for a store to count
        self._seen()
        manifest = self.watch.manifest
        here = self.request.shard_of(self.step * self.batch)
        self._pool_stats = {
            "teacher_evaluations": manifest.evaluations,
            "rejected_images": manifest.rejected,
            "lacking": dict(manifest.lacking),
            "pool_ready": sum(shard >= here for shard in manifest.shards),
            "pool_needed": max(0, self.request.shards - here),
            "pool_bytes": sum(line.bytes for line in manifest.shards.values()),
        }
        return counts | self._pool_stats

    def close(self) -> None:
        """End the reading threads. Repeatable."""
        if self._watching is not None and self.watch is not None:
            self.watch.pool.interrupt()
            self._watching.shutdown(cancel_futures=True)
        self.loader.close()

    # --- the main rank's part ------------------------------------------------------------------------------------

    def _look(self, step: int) -> list[Offer]:
        """What is new in the pool; [] on the other ranks. Raises UserError, also when there is no more hope."""
        if self.watch is None:
            return []
        self._tell_samplers()
        short = not self._covered(step)
        if self._watching is not None and not self._is_seen():
            return []  # a store that is slow or away keeps no rank from telling the others how it stands
        if self._looking is not None and not self._looking.done() and self._begun and not short:
            return []
        self._seen()
        if short and self.on_starved is not OnStarved.wait:  # no step goes without for old news
            self._looking = self._look_again()
            self._seen()
        if self._failure is not None:
            raise self._failure
        self._fail_if_hopeless(step)
        first, _ = self._shards_of(step)
        offers = self.watch.offers(first, (self.width - HEAD) // OFFER)
        self._looking = self._look_again()
        return offers

    def _look_again(self) -> Future[None]:
        assert self.watch is not None
        return self._watching.submit(self.watch.refresh) if self._watching else self.loader.run(self.watch.refresh)

    def _is_seen(self) -> bool:
        """Whether the manifest is not being read just now."""
        return self._looking is None or self._looking.done()

    def _seen(self) -> None:
        """Wait until the manifest is not being read; a failure is told in the next exchange."""
        if self._looking is None:
            return
        error, self._looking = self._looking.exception(), None
        if isinstance(error, UserError):
            self._failure = error
        elif error is not None:
            raise error

    def _fail_if_hopeless(self, step: int) -> None:
        """Raises UserError where a supervisor has given up, or nothing has come for `timeout` seconds of waiting."""
        assert self.watch is not None
        since = self._missing_since
        if since is None or self.watch.pool.away:  # which has a time limit of its own
            return
        where = f"{self._place}: shard {self._shards_of(step)[0]}"
        if message := given_up(self.run):
            raise UserError(f"{where} will not come: {message}")
        if time.monotonic() - max(since, self.watch.news) > self.timeout:
            raise UserError(
                f"{where} is needed, and no new shard has come in replay.timeout={self.timeout:g} seconds: is a "
                f"sampler running? ({describe_samplers(self.run)})"
            )

    def _tell_samplers(self) -> None:
        """Publish how far the trainer is; on a full disk at the next opportunity."""
        if self.watch is None or (self._telling is not None and not self._telling.done()):
            return
        if self._telling is not None and (error := self._telling.exception()) is not None:
            if not isinstance(error, OSError) or error.errno not in FULL_DISK:
                raise error
            self._told = {}  # the samplers go by what they were told before
        kept = self._budget.kept if self.on_starved is OnStarved.reuse else range(0)
        used = self.request.shard_of(self.step * self.batch)
        progress = {"released": min(self._released, used), "kept": [kept.start, kept.stop], "used": used}
        if progress != self._told:
            self._told = progress
            path = self.run.replay_progress(self.request.task)
            self._telling = self.loader.run(lambda: write_json(path, progress))

    def _releasable(self, step: int) -> int:
        """Shards below this are no longer needed from a checkpoint at `step` on; one is kept for a rank behind."""
        return max(0, self.request.shard_of(step * self.batch) - 1)

    # --- what all ranks do alike ---------------------------------------------------------------------------------

    def _take_complaints(self, rows: Sequence[Sequence[int]]) -> None:
        for rank, row in enumerate(rows):
            shard, serial = row[BAD_SHARD], row[BAD_SERIAL]
            if shard < 0:
                continue
            reason = f"rank {rank} could not use it"
            if rank == self.world.rank:
                reason = self.loader.found_bad.pop(0).reason
            if self._offered.get(shard) == serial:
                del self._offered[shard]
                self.loader.forget(shard)
            if self.watch is not None:
                self._complain(shard, serial, reason)

    def _complain(self, shard: int, serial: int, reason: str) -> None:
        assert self.watch is not None
        try:
            self._seen()
            self.watch.complain(shard, serial, reason)
        except UserError as error:
            self._failure = error

    def _take_offers(self, row: Sequence[int]) -> None:
        found = [row[HEAD + OFFER * number : HEAD + OFFER * (number + 1)] for number in range(row[OFFERS])]
        offers = [Offer(*words) for words in found]
        self._offered |= {offer.shard: offer.serial for offer in offers}
        self.loader.offer(offers)
        oldest = min(self.request.shard_of(self.step * self.batch), *self._budget.kept[:1] or [1 << 62])
        for shard in [shard for shard in self._offered if shard < oldest]:
            del self._offered[shard]
        self.loader.forget_below(oldest)

    def _fed(self) -> None:
        if self._missing_since is not None:
            self.counters["starved_seconds"] += time.monotonic() - self._missing_since
            self._missing_since = None

    def _starving(self, step: int, rows: Sequence[Sequence[int]]) -> bool:
        """A step whose points are not in memory everywhere; whether it can begin all the same."""
        if self._substitute is not None:
            return self._substituted(step, [row[SUBSTITUTE] for row in rows])
        if self._covered(step):
            if self.loader.pool.away and self._missing_since is None:
                self._missing_since = time.monotonic()
                self.counters["starved_steps"] += 1
            return False  # being loaded
        if self._missing_since is None:
            self._missing_since = time.monotonic()
            self.counters["starved_steps"] += 1
        # The first shards of a pool take their time even with a healthy sampler.
        if self.on_starved is OnStarved.wait or (self.on_starved is OnStarved.fail and not self._begun):
            return False
        if self.on_starved is OnStarved.fail:
            first, last = self._shards_of(step)
            self._end(f"starved at step {step}, shards {first} to {last} are not there (replay.on_starved=fail)")
        self._fed()
        positions = self._budget.draw(self.batch, self._offered) if self.on_starved is OnStarved.reuse else None
        if positions is None:
            self._replace(step, None)
            return True
        self._substitute = self.loader.load(self._share(positions))
        return False

    def _substituted(self, step: int, states: Sequence[int]) -> bool:
        """Whether all ranks know how a substitute turned out; then the step begins, with it or without replay."""
        assert self._substitute is not None
        if PENDING in states:
            return False
        self._replace(step, self._substitute.result() if all(state == THERE for state in states) else None)
        self._substitute = None
        return True

    def _replace(self, step: int, points: StoredPoints | None) -> None:
        """Decide what a starved step gets in place of its own points; None: nothing."""
        self._replaced, self._replaced_step = points, step
        name = "real_only" if points is None else "reused"
        self.counters[f"{name}_steps"] += 1
        if self.journal is not None and self.watch is not None:
            self.journal({"event": f"replay_{name}", "task": self.request.task, "step": step})

    def _substitute_state(self) -> int:
        if self._substitute is None:
            return NONE
        if not self._substitute.done():
            return PENDING
        error = self._substitute.exception()
        if isinstance(error, BadShard):
            self.loader.complain(error)
        elif error is not None:
            raise error
        return THERE if error is None else FAILED

    def _end(self, why: str) -> None:
        if self.watch is None:
            raise ToldElsewhere(why)
        raise UserError(f"{self._place}: {why}")

    @property
    def _place(self) -> str:
        """The pool, for messages."""
        return pool_url(self.request, self.run) if self.request.store else str(self.run.replay(self.request.task))

    # --- arithmetic ----------------------------------------------------------------------------------------------

    def _positions(self, step: int) -> NDArray[np.int64]:
        first = step * self.batch
        return self._share(np.arange(first, first + self.batch, dtype=np.int64))

    def _share(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        count = self.batch // self.world.size
        return positions[self.world.rank * count : (self.world.rank + 1) * count]

    def _covered(self, step: int) -> bool:
        """Whether all shards of a step were offered, and no rank has found one of them bad."""
        first, last = self._shards_of(step)
        return all(shard in self._offered for shard in range(first, last + 1))

    def _shards_of(self, step: int) -> tuple[int, int]:
        """First and last shard that all ranks together need for a step."""
        first = step * self.batch
        return self.request.shard_of(first), self.request.shard_of(first + self.batch - 1)
