"""A model's parameters laid out in a few flat ones, its units: what ZeRO does for a parameter, it does for a unit.

DeepSpeed works on every parameter by itself, in Python, at every step: a hook, copies, a norm, a look for overflow;
under stage 3 also a gathering. With a U-Net's hundreds of small tensors that costs more than half as much again as
the model. A unit is one vector holding the parameters of a block; the block's modules compute with views of it, whose
gradients come back as one vector. Flat parameters per block are FSDP's idea (Zhao et al. 2023, arXiv 2304.11277).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

ALIGNMENT = 128  # elements: every view starts at a multiple of 16 bytes, which vectorised loads need
GRAPHS = 4  # of a block: with replay and without, the rest to spare
FLAT = "flat"  # a unit's parameter is `<module>.flat`


@dataclass(frozen=True)
class Place:
    """Where a parameter lies: `shape.numel()` elements of unit number `unit` from `offset` on."""

    unit: int
    offset: int
    shape: torch.Size


@dataclass(frozen=True)
class _Slot:
    """An attribute of a module that is a view of its unit."""

    module: nn.Module
    attribute: str
    shape: torch.Size


class Unit:
    """The parameters of one module, less those of modules that are units of their own, in one vector."""

    def __init__(self, module: nn.Module, others: Sequence[nn.Module]) -> None:
        """Takes the parameters away from the modules; `others` keep theirs."""
        self.module = module
        self.names: list[str] = []  # as the module called its parameters
        self.offsets: list[int] = []
        self._slots: list[_Slot] = []
        self._sizes: list[int] = []  # of all views and of what fills the gaps between them
        self._views: list[int] = []  # which of the sizes are views
        owned = list(_owned(module, others))
        self.flat = nn.Parameter(self._lay_out(owned))
        for _, slot in owned:
            del slot.module._parameters[slot.attribute]
        module.register_parameter(FLAT, self.flat)
        self.fold()

    @property
    def shapes(self) -> list[torch.Size]:
        return [slot.shape for slot in self._slots]

    def spread(self) -> None:
        """Give the modules views of the vector as it is now; gradients of the views reach the vector in one piece."""
        parts = self.flat.split(self._sizes)
        for number, slot in zip(self._views, self._slots, strict=True):
            slot.module.__dict__[slot.attribute] = parts[number].view(slot.shape)

    def fold(self) -> None:
        """Forget the views."""
        for slot in self._slots:
            slot.module.__dict__[slot.attribute] = None  # as a module without it has it

    def _lay_out(self, owned: Sequence[tuple[str, _Slot]]) -> Tensor:
        pieces: list[Tensor] = []
        offset = 0
        for name, slot in owned:
            weight = slot.module._parameters[slot.attribute]
            assert weight is not None
            gap = -weight.numel() % ALIGNMENT
            self.names.append(name)
            self.offsets.append(offset)
            self._slots.append(slot)
            self._views.append(len(self._sizes))
            self._sizes += [weight.numel(), gap] if gap else [weight.numel()]
            pieces += [weight.detach().reshape(-1), weight.new_zeros(gap)]
            offset += weight.numel() + gap
        return torch.cat(pieces)


class Units:
    """All parameters of a model in units: one for each of its `blocks()`, where it has such, and one for the rest.

    The model is changed in place: its named parameters are the units' vectors afterwards, `places` says what lies
    where in them, by the names the parameters had. Weights that two modules share are not supported.
    """

    def __init__(self, model: nn.Module, *, gathered: bool, recompute: bool = False) -> None:
        """Args:
        gathered: the vectors are whole only while their module computes (ZeRO-3), so each module spreads its own;
            otherwise the model spreads all of them when it is called.
        recompute: keep only the inputs of each block for the backward pass, which computes the rest again (Chen et
            al. 2016, arXiv 1604.06174). The gradients are the same; dropout draws its masks again, too.
        """
        blocks: list[nn.Module] = getattr(model, "blocks", list)()
        weights = dict(model.named_parameters(remove_duplicate=False))
        assert len({id(weight) for weight in weights.values()}) == len(weights), "no weight is shared"
        prefixes = {id(module): f"{name}." if name else "" for name, module in model.named_modules()}
        self.model = model
        self.units = [Unit(module, [b for b in blocks if b is not module]) for module in [model, *blocks]]
        found = {
            prefixes[id(unit.module)] + name: Place(number, offset, shape)
            for number, unit in enumerate(self.units)
            for name, offset, shape in zip(unit.names, unit.offsets, unit.shapes, strict=True)
        }
        self.places = {name: found[name] for name in weights}
        self.gathered, self.recompute = gathered, recompute
        self._install([unit.module.forward for unit in self.units])

    def compile(self, *, autotune: bool = False) -> None:
        """Compile the model in place: as a whole, or block by block where the vectors are gathered for each.

        Args: autotune: choose among more kernels by timing them (CUDA).
        """
        import torch._dynamo.config as dynamo  # it takes a second, which most runs can do without

        # Blocks of one class share their limit of graphs, beyond which they would run uncompiled.
        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS * len(self.units))
        # Static shapes: a batch of another size, with replay or without, gets a graph of its own.
        mode = "max-autotune-no-cudagraphs" if autotune else "default"
        compiled = partial(torch.compile, dynamic=False, mode=mode)
        if self.gathered:
            self._install([self._calls[0], *map(compiled, self._calls[1:])])
        else:
            self._install([compiled(self._calls[0]), *self._calls[1:]])

    def _install(self, calls: Sequence[Callable[..., Any]]) -> None:
        """Make these the computations of the modules, each with its weights in place."""
        self._calls = list(calls)
        if self.gathered:
            for number, (unit, call) in enumerate(zip(self.units, calls, strict=True)):
                again = self.recompute and number > 0
                unit.module.forward = _recomputed(_in_place(unit, call)) if again else _gathered(unit, call)
        else:
            self.model.forward = self._spread_all(calls[0])
            if self.recompute:
                for unit, call in zip(self.units[1:], calls[1:], strict=True):
                    unit.module.forward = _recomputed(call)

    @contextmanager
    def modules_hidden(self) -> Iterator[None]:
        """Show the blocks without the modules in them while ZeRO-3 puts hooks on every module that it sees.

        A block's modules hold no parameters any more; their buffers follow the block's vector to its device and type.
        """
        blocks = [unit.module for unit in self.units[1:]]
        hidden = [block._modules for block in blocks]
        for block in blocks:
            block._modules = {}
        try:
            yield
        finally:
            for unit, modules in zip(self.units[1:], hidden, strict=True):
                unit.module._modules = modules
                for child in unit.module.children():
                    child.to(device=unit.flat.device, dtype=unit.flat.dtype)

    def _spread_all(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            for unit in self.units:
                unit.spread()
            return call(*args, **kwargs)

        return forward


def _owned(module: nn.Module, others: Sequence[nn.Module]) -> Iterator[tuple[str, _Slot]]:
    """Parameters of a module by name, less those of the `others` among its parts."""
    excluded = {id(part) for other in others for part in other.modules()}
    for prefix, part in module.named_modules():
        if id(part) in excluded:
            continue
        for attribute, weight in part._parameters.items():
            if weight is not None:
                yield f"{prefix}.{attribute}" if prefix else attribute, _Slot(part, attribute, weight.shape)


def _gathered(unit: Unit, call: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward whose views end with it: what autograd saves of them is found again in the gathered vector."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(*_by_reference(unit.flat)):
            return in_place(*args, **kwargs)

    in_place = _in_place(unit, call)
    return forward


def _in_place(unit: Unit, call: Callable[..., Any]) -> Callable[..., Any]:
    """A module's forward whose views end with it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        unit.spread()
        try:
            return call(*args, **kwargs)
        finally:
            unit.fold()

    return forward


def _recomputed(call: Callable[..., Any]) -> Callable[..., Any]:
    """A forward of which autograd saves nothing but the inputs.

    Under ZeRO-3 its second time is within the module's backward, when the vector has been gathered anew.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(call, *args, use_reentrant=False, **kwargs)

    return forward


def _by_reference(flat: Tensor) -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]:
    """Hooks that save views of a vector as their place in it: ZeRO-3 frees it, and gathers it anew for the backward."""
    begin, width = flat.data_ptr(), flat.element_size()
    end = begin + flat.numel() * width

    def pack(saved: Tensor) -> Any:
        if not begin <= saved.data_ptr() < end or saved.dtype is not flat.dtype:
            return saved
        return (saved.data_ptr() - begin) // width, saved.size(), saved.stride()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        offset, size, stride = packed
        return flat.detach().as_strided(size, stride, flat.storage_offset() + offset)

    return pack, unpack
