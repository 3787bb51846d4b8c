"""CUDA graphs of our own making: what a function launches, recorded once and launched again at once.

`torch.compile(mode="reduce-overhead")` records them too, but keeps every one until its thread ends: what is dropped
here for another shape, or unloaded, is given back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Sequence[Tensor]]
GraphPool = Any  # what `torch.cuda.graph_pool_handle` gives has no public type


class RecordedGraph:
    """A function of one tensor on a CUDA device, as a graph; it takes tensors of one shape and memory format.

    One thread records and replays all graphs of a process: cuBLAS and cuDNN keep their workspaces by thread and stream,
    and a graph writes to those it was recorded with. The next replay overwrites what this one gave, so that is copied.

    Args:
        function: launches the same kernels whatever the numbers are, and never waits for one.
        example: [n, c, h, w] on the device; its values do not matter.
        pool: where the graph's memory comes from; graphs that never run at once may share one.

    Raises:
        RuntimeError: the function cannot be recorded, or there is no memory for it.
    """

    def __init__(self, function: Function, example: Tensor, pool: GraphPool) -> None:
        reserved = torch.cuda.memory_reserved(example.device)
        stream = _recording_stream(example.device)
        self._images = example.clone()
        _run_on(stream, function, self._images)  # what is set up lazily must not be part of the graph
        self._graph = torch.cuda.CUDAGraph()
        # Other threads load models meanwhile; what they allocate is theirs.
        with torch.cuda.graph(self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self._outputs = tuple(function(self._images))
        self.bytes = max(0, torch.cuda.memory_reserved(example.device) - reserved)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The outputs for fewer images than it was recorded with, or as many; in memory of their own."""
        count = len(images)
        self._images[:count].copy_(images)  # what is left of a batch before takes the other places
        self._graph.replay()
        return tuple(output[:count].clone() for output in self._outputs)


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream a device: each has workspaces of tens of megabytes."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's


def _run_on(stream: torch.cuda.Stream, function: Function, images: Tensor) -> None:
    current = torch.cuda.current_stream(images.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        function(images)
    current.wait_stream(stream)
