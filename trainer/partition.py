"""Where each ZeRO stage keeps the fp32 weights that the optimiser updates, and how to gather and scatter them.

A rank holds a few flat fp32 tensors, the masters; Adam's moments and the EMA have the same layout. `fragments(rank)`
says which stretch of which parameter lies where in the masters of any rank, so that full tensors can be put together
and taken apart for every stage and number of ranks. The optimisers' private names are those of the DeepSpeed version
that pyproject.toml pins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.units import Place
from trainer.world import World

GATHER_NUMEL = 64_000_000  # elements of a rank gathered at once: what the device must have room for, times the ranks


@dataclass(frozen=True)
class Fragment:
    """`count` elements of the flattened parameter `name` from `offset`, kept in masters[flat] from `start`."""

    name: str
    offset: int
    count: int
    flat: int
    start: int


class Partition(ABC):
    """The local fp32 masters of one engine."""

    def __init__(self, places: dict[str, Place], world: World) -> None:
        """Args: places: where every trained parameter lies in the units, in the module's order."""
        self.places = places
        self.shapes = {name: place.shape for name, place in places.items()}
        self.world = world
        self.masters: list[Tensor] = []

    @abstractmethod
    def fragments(self, rank: int) -> Iterator[Fragment]:
        """What lies where in the masters of `rank`; all ranks together hold every element once."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model compute with the masters' present values; collective."""

    @abstractmethod
    def add_gradients(self, gradients: list[Tensor]) -> None:
        """Add to the averaged gradients of a step that is due; fp32, laid out like the masters; not collective."""

    def total(self, share: Tensor) -> Tensor:
        """Sums over all elements of the model, from those over this rank's; collective."""
        return self.world.sum(share)

    def gather(self, values: list[Tensor], everywhere: bool) -> dict[str, Tensor]:
        """Full CPU tensors by parameter name, from tensors laid out like the masters; collective.

        On every rank, or on the main rank alone, where the others get an empty dict.
        """
        wanted = everywhere or self.world.is_main
        full = {name: torch.empty(shape) for name, shape in self.shapes.items()} if wanted else {}
        for flat, local in enumerate(values):
            for begin, rows in self._gather_rows(local):
                if wanted:
                    self._copy_rows(full, flat, begin, rows)
        return full

    def scatter(self, full: Callable[[str], Tensor], values: list[Tensor]) -> None:
        """Fill this rank's tensors, laid out like the masters, from full tensors; not collective."""
        with torch.no_grad():
            for fragment in self.fragments(self.world.rank):
                source = full(fragment.name).reshape(-1).narrow(0, fragment.offset, fragment.count)
                values[fragment.flat].view(-1).narrow(0, fragment.start, fragment.count).copy_(source)

    def _gather_rows(self, local: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The flat tensors of all ranks, (ranks, n) from the same element on: in pieces, devices have little room."""
        flat = local.detach().view(-1)
        for begin in range(0, flat.numel(), GATHER_NUMEL):
            yield begin, self.world.all_gather(flat[begin : begin + GATHER_NUMEL]).view(self.world.size, -1)

    def _copy_rows(self, full: dict[str, Tensor], flat: int, begin: int, rows: Tensor) -> None:
        """Put elements from `begin` on of masters[flat], of every rank (ranks, n), where they belong."""
        for rank, row in enumerate(rows):
            for fragment in self.fragments(rank):
                first = max(begin, fragment.start)
                last = min(begin + row.numel(), fragment.start + fragment.count)
                if fragment.flat == flat and first < last:
                    offset = fragment.offset + first - fragment.start
                    target = full[fragment.name].view(-1).narrow(0, offset, last - first)
                    target.copy_(row.narrow(0, first - begin, last - first))


class WholePartition(Partition):
    """ZeRO-0 in fp32: every rank keeps and updates the units themselves."""

    def __init__(self, places: dict[str, Place], world: World, units: list[Tensor]) -> None:
        super().__init__(places, world)
        self.masters = units

    def fragments(self, rank: int) -> Iterator[Fragment]:
        for name, place in self.places.items():
            yield Fragment(name, 0, place.shape.numel(), place.unit, place.offset)

    def publish(self) -> None:
        """The masters are the model."""

    def add_gradients(self, gradients: list[Tensor]) -> None:
        for master, gradient in zip(self.masters, gradients, strict=True):
            master.grad = gradient if master.grad is None else master.grad.add_(gradient)

    def total(self, share: Tensor) -> Tensor:
        """Every rank has every element."""
        return share

    def gather(self, values: list[Tensor], everywhere: bool) -> dict[str, Tensor]:
        """As of every partition, without a collective."""
        if not (everywhere or self.world.is_main):
            return {}
        return {name: self._own(values, place) for name, place in self.places.items()}

    @staticmethod
    def _own(values: list[Tensor], place: Place) -> Tensor:
        """A CPU copy, never a view: what is written in the background must not change."""
        row = values[place.unit].detach().narrow(0, place.offset, place.shape.numel())
        return torch.empty(place.shape).copy_(row.view(place.shape))


class FlatPartition(Partition):
    """ZeRO-1 and 2: all units behind each other in one vector, padded and cut into equal parts."""

    def __init__(self, places: dict[str, Place], world: World, optimizer: Any) -> None:
        super().__init__(places, world)
        assert len(optimizer.single_partition_of_fp32_groups) == 1, "one parameter group"
        self._optimizer = optimizer
        self.masters = list(optimizer.single_partition_of_fp32_groups)
        self._part = int(optimizer.partition_size[0])
        self._offsets: list[int] = list(optimizer.round_robin_bit16_offsets[0])

    def fragments(self, rank: int) -> Iterator[Fragment]:
        begin, end = rank * self._part, (rank + 1) * self._part
        for name, place in self.places.items():
            origin = self._offsets[place.unit] + place.offset
            first, last = max(begin, origin), min(end, origin + place.shape.numel())
            if first < last:
                yield Fragment(name, first - origin, last - first, 0, first - begin)

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def add_gradients(self, gradients: list[Tensor]) -> None:
        _add_to_averages(self._optimizer.averaged_gradients, gradients)


class ShardedPartition(Partition):
    """ZeRO-3: every unit padded and cut into equal parts, a rank's parts behind each other in sub-groups."""

    def __init__(self, places: dict[str, Place], world: World, optimizer: Any, units: dict[int, int]) -> None:
        """Args: units: numbers of the units by DeepSpeed's parameter id."""
        super().__init__(places, world)
        self._optimizer = optimizer
        self.masters = list(optimizer.fp32_partitioned_groups_flat)
        self._parts: dict[int, tuple[int, int, int]] = {}  # of each unit: the master, where in it, how many elements
        for flat, group in enumerate(optimizer.fp16_groups):
            start = 0
            for parameter in group:
                part = int(parameter.partition_numel())
                self._parts[units[parameter.ds_id]] = flat, start, part
                start += part

    def fragments(self, rank: int) -> Iterator[Fragment]:
        for name, place in self.places.items():
            flat, start, part = self._parts[place.unit]
            begin = rank * part
            first, last = max(begin, place.offset), min(begin + part, place.offset + place.shape.numel())
            if first < last:
                yield Fragment(name, first - place.offset, last - first, flat, start + first - begin)

    def add_gradients(self, gradients: list[Tensor]) -> None:
        _add_to_averages(self._optimizer.averaged_gradients, gradients)

    def publish(self) -> None:
        """As the end of the optimiser's step does it; small parameters are kept whole by every rank and gathered."""
        optimizer = self._optimizer
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _add_to_averages(averages: dict[int, Any], gradients: list[Tensor]) -> None:
    """Put sums in the place of what DeepSpeed has averaged for each of its groups: pieces of one flat vector.

    In fp32 from here on, as it would have them a little later; the padding at the end may be left out there.
    """
    for group, gradient in enumerate(gradients):
        start = 0
        for piece in averages[group]:
            gradient[start : start + piece.numel()] += piece.reshape(-1)
            start += piece.numel()
        averages[group] = [gradient]
