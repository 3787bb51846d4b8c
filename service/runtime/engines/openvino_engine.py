"""OpenVINO on the CPU: the same network converted once, compiled for what is asked of it."""

from __future__ import annotations

import hashlib
import importlib
import os
import sys
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from service.config.spec import Precision
from service.protocol.reply import FloatArray
from service.runtime.engines.base import BackboneEngine

# Without hints the CPU plugin computes in bfloat16 wherever the machine can.
HINTS: Mapping[Precision, str] = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
# Compiled graphs that one network keeps: node sets, precisions, one stream or several.
MAX_VARIANTS = 4
# How often a graph that gives more than is asked for is used before one is compiled that does not.
MISSES_BORNE = 8
# Output shapes that one compiled graph remembers, by input shape.
MAX_SHAPES = 64
# Numbers of the largest input whose activations a compiled graph keeps for the next: four megapixels, three channels.
MAX_KEPT_INPUT = 12_000_000
# Measured over ResNet-50: what compiling keeps of the constants, and what each compiled graph packs anew.
CONSTANTS_SHARE, VARIANT_SHARE = 1.5, 1.15


def load_openvino() -> Any:
    """The library, without its telemetry: importing it would report to its maker over the network.

    An entry of None in `sys.modules` makes the import of the telemetry package fail, which OpenVINO takes as "not
    installed".
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # documented by the import system
    return importlib.import_module("openvino")


class DamagedNetworkError(Exception):
    """The files of a network have other bytes than those that were written."""


def network_sha256(path: Path) -> str:
    """The sha256 of an `.xml` and its `.bin`, one after the other; 64 hex digits.

    Raises:
        OSError: they cannot be read.
    """
    digest = hashlib.sha256(path.read_bytes())
    with path.with_suffix(".bin").open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


@dataclass(frozen=True)
class Threads:
    """How the cores are shared: one batch alone has all of them, of several at a time each has its part."""

    cores: int
    streams: int

    @classmethod
    def of(cls, cores: int) -> Threads:
        """Two streams from two cores on, then one for every four cores: more only lengthens each reply."""
        return cls(cores, 1 if cores < 2 else max(2, cores // 4))


class OpenVINODevice:
    """The CPU as OpenVINO sees it."""

    def __init__(self, threads: Threads) -> None:
        self._openvino = load_openvino()
        self.threads = threads
        self._core = self._openvino.Core()

    def precisions(self) -> frozenset[Precision]:
        """What the processor computes natively."""
        native = set(self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        found: tuple[tuple[str, Precision], ...] = (
            ("FP32", "float32"),
            ("BF16", "bfloat16"),
            ("FP16", "float16"),
        )
        return frozenset(precision for word, precision in found if word in native)

    def read(self, path: Path, sha256: str = "") -> Any:
        """The network of an `.xml` with its `.bin` beside it, copied into memory: a mapped file that is cut off ends
        the process.

        Args:
            path: of the `.xml`.
            sha256: as `network_sha256` gives it; empty if any will do.

        Raises:
            DamagedNetworkError: other bytes.
            RuntimeError: not a network.
            OSError: the files are gone.
        """
        text = path.read_bytes()
        with path.with_suffix(".bin").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            weights = self._openvino.Tensor(self._openvino.Type.u8, self._openvino.Shape([size]))
            came = file.readinto(weights.data)
        digest = hashlib.sha256(text)
        digest.update(memoryview(weights.data))
        if came != size or sha256 not in ("", digest.hexdigest()):
            raise DamagedNetworkError
        return self._core.read_model(text.decode(), weights)

    def save(self, model: Any, path: Path) -> str:
        """Write an `.xml` and its `.bin`, in full precision, and read them back; gives their sha256.

        Raises:
            OSError: they cannot be written, or do not say what the network is.
        """
        try:
            self._openvino.save_model(model, path, compress_to_fp16=False)
            self.read(path)
        except RuntimeError as error:
            raise OSError("a network that cannot be written") from error
        return network_sha256(path)

    def compiled(self, model: Any, precision: Precision, *, streams: int) -> Any:
        """The network ready to run. Threads are not pinned: decoding needs the same cores, and so may a neighbour."""
        settings = {
            "INFERENCE_PRECISION_HINT": HINTS[precision],
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": str(self.threads.cores),
            "ENABLE_CPU_PINNING": False,
        }
        return self._core.compile_model(model, "CPU", settings)

    def pruned(self, model: Any, outputs: Sequence[int]) -> Any:
        """The network with some of its outputs only; what these do not need is not there."""
        results = [model.get_results()[output] for output in outputs]
        return self._openvino.Model(results, model.get_parameters(), model.friendly_name)

    def tensor(self, array: FloatArray) -> Any:
        """The array as OpenVINO's tensor, the same memory."""
        return self._openvino.Tensor(array, shared_memory=True)


class Variant:
    """One compiled graph and its idle requests; any number of threads may run it."""

    def __init__(self, device: OpenVINODevice, compiled: Any) -> None:
        self._device = device
        self._compiled = compiled
        self._idle: deque[Any] = deque()
        self._shapes: OrderedDict[tuple[int, ...], list[tuple[int, ...]]] = OrderedDict()
        self._lock = threading.Lock()
        self._running = 0
        self._has_grown = False

    def run(self, images: FloatArray) -> list[FloatArray]:
        """The outputs in memory of their own, written there by the network itself once their shapes are known."""
        with self._in_use(images.size), self._request(images.shape) as (request, shapes):
            request.set_input_tensor(self._device.tensor(images))
            arrays = [np.empty(shape, np.float32) for shape in shapes]
            for output, array in enumerate(arrays):
                request.set_output_tensor(output, self._device.tensor(array))
            request.infer(share_outputs=True)
            if arrays:
                return arrays
            outputs = [
                request.get_output_tensor(output).data for output in range(len(self._compiled.outputs))
            ]
            if not all(output.size and len(output) == len(images) for output in outputs):
                raise RuntimeError(f"the converted network gave nothing for {images.shape}")
            self._remember(images.shape, [output.shape for output in outputs])
            return [output.copy() for output in outputs]

    @contextmanager
    def _in_use(self, numbers: int) -> Iterator[None]:
        """Counts who runs. The last of a large input gives its activations back, which OpenVINO would keep for ever."""
        with self._lock:
            self._running += 1
            self._has_grown |= numbers > MAX_KEPT_INPUT
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1
                if self._has_grown and not self._running:
                    self._idle.clear()
                    self._compiled.release_memory()
                    self._has_grown = False

    @contextmanager
    def _request(self, shape: tuple[int, ...]) -> Iterator[tuple[Any, Sequence[tuple[int, ...]]]]:
        """A request and the shapes of its outputs; none where they are not known, and then a request that was not used:
        a used one still has memory of other shapes to write to, and would write beyond its end.
        """
        with self._lock:
            shapes = self._shapes.get(shape, [])
            idle = self._idle.pop() if shapes and self._idle else None
        request = self._compiled.create_infer_request() if idle is None else idle
        yield request, shapes
        if shapes:
            self._idle.append(request)  # one that failed is dropped

    def _remember(self, shape: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
        with self._lock:
            self._shapes[shape] = shapes
            while len(self._shapes) > MAX_SHAPES:
                self._shapes.popitem(last=False)


Key = tuple[tuple[str, ...], Precision, bool]


class OpenVINOEngine(BackboneEngine):
    """A converted network with all of its features; compiled for each set of them that is asked for.

    Args:
        device: where it runs.
        path: the `.xml` of the network, whose outputs are the features of `nodes` in their order.
        nodes: shallow to deep.
        missing: for each node the weights that it needs and the checkpoint has not.
        room: how many bytes more the network may take; asked before it is compiled once more.
        sha256: of the network's files; empty if any will do.
    """

    name = "openvino"
    concurrent = True

    def __init__(
        self,
        device: OpenVINODevice,
        path: Path,
        nodes: Sequence[str],
        missing: Mapping[str, Sequence[str]],
        room: Callable[[], int],
        sha256: str = "",
    ) -> None:
        self._device = device
        self._model = device.read(path, sha256)
        self._nodes = tuple(nodes)
        self._missing = missing
        self._room = room
        self._weight_bytes = path.with_suffix(".bin").stat().st_size
        self._variants: OrderedDict[Key, Variant] = OrderedDict()
        self._misses: Counter[Key] = Counter()
        self._compiling = threading.Lock()

    @property
    def bytes(self) -> int:
        """The constants as compiling leaves them, and the packed weights of each compiled graph."""
        return self.estimated_bytes(self._weight_bytes, max(1, len(self._variants)))

    @staticmethod
    def estimated_bytes(weight_bytes: int, variants: int) -> int:
        """What a network whose constants have so many bytes takes, compiled so many times."""
        return int(weight_bytes * (CONSTANTS_SHARE + VARIANT_SHARE * variants))

    def run(
        self, images: FloatArray | Tensor, nodes: Sequence[str], precision: Precision, *, crowded: bool
    ) -> dict[str, Tensor]:
        """As `BackboneEngine.run`; tensors share the memory that the network wrote to."""
        wanted = tuple(node for node in self._nodes if node in set(nodes))
        given, variant = self._variant(wanted, precision, crowded=crowded)
        # OpenVINO takes memory that it could write to, though it does not.
        arrays = variant.run(np.require(np.asarray(images), requirements=["C", "W"]))
        return {node: torch.from_numpy(array) for node, array in zip(given, arrays, strict=True)}

    def close(self) -> None:
        """As `BackboneEngine.close`: nothing of it is part of a cycle, so that its memory goes with it."""

    def needs_missing(self, node: str) -> Sequence[str]:
        """As `BackboneEngine.needs_missing`."""
        return self._missing.get(node, ())

    def _variant(
        self, nodes: tuple[str, ...], precision: Precision, *, crowded: bool
    ) -> tuple[tuple[str, ...], Variant]:
        """A compiled graph that gives these features, and all that it gives."""
        several = crowded and self._device.threads.streams > 1
        with self._compiling:
            key = nodes, precision, several
            if key not in self._variants and several and not self._may_grow():
                key = nodes, precision, False
            if key not in self._variants:
                key = self._wider(key) or self._compile(key)
            self._variants.move_to_end(key)
            return key[0], self._variants[key]

    def _wider(self, key: Key) -> Key | None:
        """A compiled graph that gives these features and others no deeper, unless they are asked for so often that a
        graph of their own pays. Requests that happen to run together ask for any union of features.
        """
        nodes, precision, several = key
        self._misses[key] += 1
        if self._misses[key] > MISSES_BORNE:
            return None
        fitting = (
            known
            for known in self._variants
            if known[1:] == (precision, several) and set(nodes) <= set(known[0]) and known[0][-1] == nodes[-1]
        )
        return min(fitting, key=lambda known: len(known[0]), default=None)

    def _compile(self, key: Key) -> Key:
        nodes, precision, several = key
        model = self._device.pruned(self._model, [self._nodes.index(node) for node in nodes])
        streams = self._device.threads.streams if several else 1
        compiled = self._device.compiled(model, precision, streams=streams)
        self._variants[key] = Variant(self._device, compiled)
        while len(self._variants) > MAX_VARIANTS:
            self._variants.popitem(last=False)
        self._misses.clear()
        return key

    def _may_grow(self) -> bool:
        return self._weight_bytes * VARIANT_SHARE <= self._room()
