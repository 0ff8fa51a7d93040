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
    Kind("kill -9 sampler", processes.kill_sampler),
    Kind("SIGTERM", processes.sigterm),
    Kind("SIGUSR1", processes.sigusr1),
    Kind("sampler hung", processes.hang_sampler),
    Kind("shard truncated", files.truncate_shard, down=True),
    Kind("shard bit flipped", files.flip_shard, down=True),
    Kind("shard deleted", files.delete_shard, down=True),
    Kind("shard swapped", files.swap_shard, down=True),
    Kind("shard of another teacher", files.foreign_shard, down=True),
    Kind("line of another teacher", files.foreign_line, down=True),
    Kind("manifest torn", files.tear_manifest, down=True),
    Kind("manifest bit flipped", files.flip_manifest, down=True),
    Kind("checkpoint bit flipped", files.flip_checkpoint, up=False, down=True),
    Kind("checkpoint truncated", files.truncate_checkpoint, up=False, down=True),
    Kind("full disk", files.full_disk),
    Kind("second start", processes.second_start),
)


class Deck:
    """Deals kinds of faults in a seeded order: each once, then each again.

    A kind that is not possible at a moment stays on top and is tried at the next.
    """

    def __init__(self, chance: random.Random, without: Collection[str] = ()) -> None:
        self.kinds = [kind for kind in KINDS if kind.name not in without]
        self._chance = chance
        self._cards = chance.sample(self.kinds, len(self.kinds))

    def deal(self, scene: Scene, *, up: bool) -> Fault | None:
        """Inject the first kind that is possible now, while the job runs (`up`) or between two starts."""
        return self._deal(scene, up) or (self._renew() and self._deal(scene, up)) or None

    def _deal(self, scene: Scene, up: bool) -> Fault | None:
        # Between two starts, what is possible only there comes first.
        for kind in self._cards if up else sorted(self._cards, key=lambda kind: kind.up):
            fault = kind.inject(scene) if (kind.up if up else kind.down) else None
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
