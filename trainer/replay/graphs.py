"""The frozen teacher as fast as its device runs it: compiled when asked, under CUDA graphs where there is CUDA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.diffusion.samplers import Predict

WARM_UPS = 3  # calls before a capture: libraries choose algorithms and allocate workspaces in the first ones


def fast_predict(model: nn.Module, device: torch.device, *, compiled: bool) -> Predict:
    """A frozen model as a function (x, t, label) -> prediction, for `torch.inference_mode` or `no_grad`.

    Args:
        model: on `device`, in the type it shall compute in.
        compiled: by torch.compile, with static shapes.
    """
    call: Predict = torch.compile(model, dynamic=False) if compiled else model
    return GraphedPredict(call) if device.type == "cuda" else call


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, Tensor, Tensor | None]
    output: Tensor


class GraphedPredict:
    """Replays one CUDA graph for each shape of batch it is called with: one launch for all kernels of an evaluation.

    The graph holds the kernels that ran when it was captured, so results are those of the call it wraps, bit for bit.
    """

    def __init__(self, call: Predict) -> None:
        self._call = call
        self.forget()

    def forget(self) -> None:
        """Drop all graphs, and with them the memory that they hold on to."""
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._pool: Any = None  # the graphs run one after the other: one memory serves all

    def __call__(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        key = x.shape, x.dtype, t.dtype, label is None, x.device
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = self._capture(x, t, label)
        for held, given in zip(captured.inputs, (x, t, label), strict=True):
            if held is not None and given is not None:
                held.copy_(given)
        captured.graph.replay()
        return captured.output.clone()

    def _capture(self, x: Tensor, t: Tensor, label: Tensor | None) -> _Captured:
        inputs = x.clone(), t.clone(), None if label is None else label.clone()
        call: Callable[[], Tensor] = partial(self._call, *inputs)
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                call()
        torch.cuda.current_stream(x.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        # Of a capture that is global, the calls of other threads are errors: an inline trainer's readers lock pages.
        with torch.cuda.device(x.device), torch.cuda.graph(graph, self._pool, capture_error_mode="thread_local"):
            output = call()
        return _Captured(graph, inputs, output)
