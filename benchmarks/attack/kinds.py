"""The kinds of faults and the order in which they come."""

from __future__ import annotations

import random
from collections.abc import Collection

from attack import files, processes
from attack.scene import Fault, Kind, Scene

KINDS = (
    Kind("kill -9 rank", processes.kill_rank),
    Kind("kill -9 all", processes.kill_all),
    Kind("kill -9 launcher", processes.kill_launcher),
    Kind("kill -9 runner", processes.kill_runner),
    Kind("kill -9 sampler", processes.kill_sampler, gentle=True),
    Kind("SIGTERM", processes.sigterm),
    Kind("SIGUSR1", processes.sigusr1),
    Kind("SIGTERM, then kill -9", processes.kill_stopping),
    Kind("sampler hung", processes.hang_sampler, gentle=True),
    Kind("shard truncated", files.truncate_shard, down=True, gentle=True),
    Kind("shard bit flipped", files.flip_shard, down=True, gentle=True),
    Kind("shard deleted", files.delete_shard, down=True, gentle=True),
    Kind("shard swapped", files.swap_shard, down=True, gentle=True),
    Kind("shard of another teacher", files.foreign_shard, down=True, gentle=True),
    Kind("line of another teacher", files.foreign_line, down=True, gentle=True),
    Kind("manifest torn", files.tear_manifest, down=True, gentle=True),
    Kind("manifest bit flipped", files.flip_manifest, down=True, gentle=True),
    Kind("checkpoint bit flipped", files.flip_checkpoint, up=False, down=True),
    Kind("checkpoint truncated", files.truncate_checkpoint, up=False, down=True),
    Kind("full disk", files.full_disk),
    Kind("second start", processes.second_start),
)


class Deck:
    """Deals kinds of faults in a seeded order: each once, then each again.

    A kind that is not possible at a moment stays on top and is tried at the next.
    """

    def __init__(self, chance: random.Random, names: Collection[str]) -> None:
        self.kinds = [kind for kind in KINDS if kind.name in names]
        self._chance = chance
        self._cards = chance.sample(self.kinds, len(self.kinds))

    def deal(self, scene: Scene, *, up: bool, gentle: bool = False) -> Fault | None:
        """Inject the first kind that is possible now, while the job runs (`up`) or between two starts.

        `gentle`: only such as the job survives. Everything is dealt anew only where nothing at all is possible.
        """
        fault = self._deal(scene, up, gentle)
        if fault is None and up and not gentle and self._renew():
            fault = self._deal(scene, up, gentle)
        return fault

    def _deal(self, scene: Scene, up: bool, gentle: bool) -> Fault | None:
        # Between two starts, what is possible only there comes first.
        for kind in list(self._cards) if up else sorted(self._cards, key=lambda kind: kind.up):
            if (not kind.up if up else not kind.down) or (gentle and not kind.gentle):
                continue
            fault = kind.inject(scene)
            if fault is not None:
                fault.kind = kind.name
                self._cards.remove(kind)
                return fault
        return None

    def _renew(self) -> bool:
        """Put back, in a new order, what has been dealt; whether there was any."""
        dealt = [kind for kind in self.kinds if kind not in self._cards]
        self._cards += self._chance.sample(dealt, len(dealt))
        return bool(dealt)
