"""torch.compile's inductor: code made for one shape of input, beside the torch module whose weights it reads."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from service.backbones.base import Backbone
from service.config.spec import Precision
from service.protocol.reply import FloatArray
from service.runtime.engines.base import BackboneEngine, on_device
from service.runtime.engines.comparison import TOLERANCES, relative_distance
from service.runtime.engines.cuda_graphs import GraphPool, RecordedGraph
from service.runtime.engines.torch_engine import AUTOCAST, TorchEngine

# Shapes of one model that are compiled at a time. One that answered lately is not dropped for another: where clients
# send more sizes than this, compiling would never end.
MAX_SHAPES = 16
IDLE_AFTER_S = 600.0
log = logging.getLogger("service.engines")


@dataclass(frozen=True)
class Shape:
    """What code is made for: features by node in alphabetical order, precision, and [height, width] of the input."""

    nodes: tuple[str, ...]
    precision: Precision
    size: tuple[int, int]

    @classmethod
    def of(cls, nodes: Iterable[str], precision: Precision, size: Sequence[int]) -> Shape:
        """The shape of a request."""
        return cls(tuple(sorted(set(nodes))), precision, (size[0], size[1]))


def bucket_of(images: int, max_batch: int) -> int:
    """The number of images that code is made for where so many are to be run: a power of two, or `max_batch`."""
    return min(1 << max(0, images - 1).bit_length(), max_batch)


class NotCompiled(Exception):
    """The interpreter runs what should have been compiled."""


class CompiledBatch:
    """One backbone compiled for one shape and number of images.

    Making it costs nothing; the first call compiles, for tens of seconds, on whatever thread it is made. That thread
    must be set to as many threads of OpenMP as the one that calls it later.
    """

    def __init__(self, torch_engine: TorchEngine, shape: Shape, images: int, pool: GraphPool | None) -> None:
        from torch._dynamo import run  # takes a second, and most processes compile nothing

        function = _feature_function(torch_engine.backbone, shape, torch_engine.device)
        self._images = images
        self._pool = pool
        self._compiling = torch.compile(
            function, fullgraph=True, dynamic=False, options={"guard_filter_fn": _no_guards}
        )
        self._compiled = run(function)  # what is compiled, or the function itself: it never compiles
        self._graph: RecordedGraph | None = None
        self._may_record = pool is not None

    @property
    def bytes(self) -> int:
        """What its graph takes of the device's memory; the code itself takes little."""
        return 0 if self._graph is None else self._graph.bytes

    def compile(self, images: Tensor) -> None:
        """Compile, with exactly as many images as it is for."""
        self._compiling(images)

    def without_graph(self, images: Tensor) -> Sequence[Tensor]:
        """The features of exactly as many images as it is for, by compiled code; any thread may ask.

        Raises:
            NotCompiled: `compile` was not called.
        """
        found: Sequence[Tensor] = self._compiled(images)
        return found

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """The features of as many images as it is for, or fewer. Raises what `without_graph` raises."""
        if self._graph is None and self._may_record:
            self._record(self._filled(images))
        if self._graph is not None:
            return self._graph(images)
        return tuple(feature[: len(images)] for feature in self.without_graph(self._filled(images)))

    def _filled(self, images: Tensor) -> Tensor:
        """Copies of the last image take the places that are left."""
        missing = self._images - len(images)
        if not missing:
            return images
        filled = torch.cat([images, images[-1:].expand(missing, -1, -1, -1)])
        return filled.contiguous(memory_format=memory_format(images.device))

    def _record(self, images: Tensor) -> None:
        """Make a graph of it, once; on the thread of the device, which alone replays it."""
        assert self._pool is not None
        self._may_record = False
        try:
            self._graph = RecordedGraph(self.without_graph, images, self._pool)
        except RuntimeError:
            log.warning("compiled code cannot be recorded as a CUDA graph and runs without", exc_info=True)


class InductorEngine(BackboneEngine):
    """What is compiled of one backbone so far, for the shapes that were asked for.

    A batch is run in pieces for which there is code: filled up with copies, or divided. `compile` runs on a thread of
    the background, `run` on the device's, the rest anywhere.

    Args:
        torch_engine: the module and its weights, which are shared and not copied.
        max_batch: images in one piece.
    """

    name = "inductor"
    by_nodes = True

    def __init__(self, torch_engine: TorchEngine, max_batch: int) -> None:
        self._torch = torch_engine
        self._max_batch = max_batch
        self._ready: OrderedDict[Shape, dict[int, CompiledBatch]] = OrderedDict()
        self._used_at: dict[Shape, float] = {}
        self._missed: dict[Shape, set[int]] = {}
        self._lock = threading.Lock()
        is_cuda = torch_engine.device.type == "cuda"
        self._pool: GraphPool | None = torch.cuda.graph_pool_handle() if is_cuda else None

    @property
    def bytes(self) -> int:
        """The module's, and what graphs take beside it."""
        with self._lock:
            graphs = sum(batch.bytes for batches in self._ready.values() for batch in batches.values())
        return self._torch.bytes + graphs

    def close(self) -> None:
        """As `BackboneEngine.close`; its module's weights with its graphs."""
        with self._lock:
            self._ready.clear()
        self._torch.close()

    def needs_missing(self, node: str) -> Sequence[str]:
        """As `BackboneEngine.needs_missing`."""
        return self._torch.needs_missing(node)

    # --- running --------------------------------------------------------------------------------

    @torch.no_grad()  # compiled code is made for ordinary tensors, not for those of inference mode
    def run(
        self,
        images: FloatArray | Tensor,
        nodes: Sequence[str],
        precision: Precision,
        *,
        crowded: bool,
    ) -> dict[str, Tensor]:
        """As `BackboneEngine.run`, for a shape that it `serves`."""
        shape = Shape.of(nodes, precision, images.shape[2:])
        placed = placed_for_code(images, self._torch.device)
        try:
            pieces = self._pieces(shape, placed)
        except (KeyError, NotCompiled):  # dropped between the lease and now
            log.warning("%s is not compiled any more: torch answers", shape)
            return self._torch.run(placed, nodes, precision, crowded=crowded)
        joined = pieces[0] if len(pieces) == 1 else [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        return dict(zip(shape.nodes, joined, strict=True))

    def _pieces(self, shape: Shape, images: Tensor) -> list[tuple[Tensor, ...]]:
        pieces: list[tuple[Tensor, ...]] = []
        first = 0
        while first < len(images):
            bucket, batch = self._best(shape, len(images) - first)
            pieces.append(batch(images[first : first + bucket]))
            first += bucket
        return pieces

    def _best(self, shape: Shape, images: int) -> tuple[int, CompiledBatch]:
        """The smallest that takes so many images, else the largest there is; what would fit better is noted."""
        bucket = bucket_of(images, self._max_batch)
        with self._lock:
            ready = self._ready[shape]
            if bucket not in ready:
                self._missed.setdefault(shape, set()).add(bucket)
            best = min((size for size in ready if size >= images), default=max(ready))
            return best, ready[best]

    # --- what there is --------------------------------------------------------------------------

    def serves(self, shape: Shape) -> bool:
        """Whether there is code for a shape; it is then kept for a while."""
        with self._lock:
            if shape not in self._ready:
                return False
            self._ready.move_to_end(shape)
            self._used_at[shape] = time.monotonic()
            return True

    @property
    def shapes(self) -> int:
        """For how many shapes there is code."""
        return len(self._ready)

    def missed(self, shape: Shape) -> frozenset[int]:
        """Numbers of images that would have been worth code of their own."""
        with self._lock:
            return frozenset(self._missed.get(shape, ()))

    def has_room(self, shape: Shape) -> bool:
        """Whether a shape may be added, in the place of one that is no longer asked for if need be."""
        with self._lock:
            if shape in self._ready or len(self._ready) < MAX_SHAPES:
                return True
            oldest = next(iter(self._ready))
            return time.monotonic() - self._used_at[oldest] > IDLE_AFTER_S

    # --- compiling ------------------------------------------------------------------------------

    @torch.no_grad()
    def compile(self, shape: Shape, bucket: int, image: FloatArray) -> CompiledBatch:
        """Code for one shape and number of images, not yet in use. Takes tens of seconds.

        Args:
            image: [1, c, height, width], normalised.

        Raises:
            RuntimeError, ValueError, TypeError, OSError: whatever is in the way of it.
        """
        batch = CompiledBatch(self._torch, shape, bucket, self._pool)
        batch.compile(placed_for_code(_varied(image, bucket), self._torch.device))
        return batch

    @torch.no_grad()
    def difference(self, shape: Shape, bucket: int, batch: CompiledBatch, image: FloatArray) -> str | None:
        """In what compiled code differs from torch beyond the tolerance; None if it does not.

        Args:
            image: as for `compile`; moved about it fills the batch, and each place is compared by itself.
        """
        images = placed_for_code(_varied(image, bucket), self._torch.device)
        expected = self._torch.run(images, shape.nodes, shape.precision, crowded=True)
        for node, found in zip(shape.nodes, batch.without_graph(images), strict=True):
            distance = max(map(relative_distance, found, expected[node]))
            if distance > TOLERANCES[shape.precision]:
                size = "x".join(map(str, shape.size))
                return f"it differs from torch by {distance:.1e} at {node}, on {bucket} images of {size}"
        return None

    def publish(self, shape: Shape, batches: Mapping[int, CompiledBatch]) -> None:
        """Let code answer; what was used least recently gives way."""
        with self._lock:
            self._ready.setdefault(shape, {}).update(batches)
            self._ready.move_to_end(shape)
            self._used_at[shape] = time.monotonic()
            self._missed.get(shape, set()).difference_update(batches)
            while len(self._ready) > MAX_SHAPES:
                oldest, _ = self._ready.popitem(last=False)
                self._used_at.pop(oldest)
                self._missed.pop(oldest, None)


def memory_format(device: torch.device) -> torch.memory_format:
    """How the images lie in memory: tensor cores take channels last."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def placed_for_code(images: FloatArray | Tensor, device: torch.device) -> Tensor:
    """[n, c, h, w] on the device, laid out as compiled code takes it."""
    return on_device(images, device).contiguous(memory_format=memory_format(device))


def _varied(image: FloatArray, count: int) -> Tensor:
    """So many different images, [count, c, h, w], made of one, [1, c, h, w]."""
    original = torch.from_numpy(image[0])
    return torch.stack([original.roll(place, dims=-1) for place in range(count)])


def _feature_function(backbone: Backbone, shape: Shape, device: torch.device) -> Callable[[Tensor], Any]:
    """From images to the features of a shape, float32, in the order of its nodes.

    It has a code object of its own: with that torch keeps what it compiles, eight of each at most, while it lives.
    """
    dtype = AUTOCAST.get(shape.precision)
    bound = backbone.bound(shape.nodes)

    def features(images: Tensor) -> tuple[Tensor, ...]:
        if not torch.compiler.is_compiling():
            raise NotCompiled
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            found = bound(images)
        return tuple(found[node].float() for node in shape.nodes)

    code = features.__code__.replace()
    return FunctionType(code, features.__globals__, features.__name__, None, features.__closure__)


def _no_guards(guards: Sequence[object]) -> list[bool]:
    """Nothing to check before each call: weights and shape never change, and some of what is guarded by default is
    the whole process's, such as the default device, which a load on another thread changes for a moment.
    """
    return [False] * len(guards)
