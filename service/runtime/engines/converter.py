"""The converter: a process of its own, for tracing holds the interpreter and would stall the requests of the service.

`python -m service.runtime.engines.converter` reads orders from its standard input, one JSON line each, and answers
each with the facts that it found, on one line of standard output. It ends when its input does.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from service.backbones.base import Backbone
from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.errors import InvalidConfig, ServiceError, Unavailable
from service.necks.catalogue import neck_registry
from service.protocol.reply import FloatArray
from service.runtime.device import return_freed_memory
from service.runtime.engines.artefacts import NO_ROOM, Facts
from service.runtime.engines.comparison import TOLERANCES, relative_distance
from service.runtime.engines.openvino_engine import OpenVINODevice, OpenVINOEngine, Threads, load_openvino
from service.runtime.engines.orders import Order
from service.runtime.engines.torch_engine import TorchEngine
from service.runtime.model import LoadedModel, build_model
from service.runtime.plan import SIZE_ERRORS, Plan, Planner

CPU = torch.device("cpu")
LOWEST_PRIORITY = 19
# What differs on noise by a third of what is promised may differ by more than that on a photo.
MARGIN = 0.3
OUT_OF_MEMORY_SCORE = Path("/proc/self/oom_score_adj")
TIMED_RUNS = 3
# A run that takes this long tells enough by itself.
LONG_RUN_MS = 1000.0
LARGEST_TRIED = 512
SMALLER = 256, 256
# What tracing and conversion raise for networks that they cannot follow.
CONVERSION_ERRORS = (
    RuntimeError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    NotImplementedError,
)


class Unconvertible(Exception):
    """A network that OpenVINO cannot run, or not as torch does."""


class _Outputs(nn.Module):
    """A backbone as tracing wants it: features in a fixed order."""

    def __init__(self, backbone: Backbone, nodes: Sequence[str]) -> None:
        super().__init__()
        self._backbone = backbone
        self._nodes = tuple(nodes)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        found = self._backbone(images, self._nodes)
        return tuple(found[node].float() for node in self._nodes)


@dataclass(frozen=True)
class _Trial:
    """One converted network beside the torch module that it should equal."""

    model: LoadedModel
    nodes: tuple[str, ...]
    converted: OpenVINOEngine
    channels: int
    sha256: str

    def errors_at(self, size: tuple[int, int], count: int) -> dict[str, float] | None:
        """Relative L2 distances by node; infinite where the converted network fails, None where torch does."""
        images = _images(count, self.channels, size)
        try:
            expected = self.model.engine.run(images, self.nodes, "float32", crowded=False)
        except (*SIZE_ERRORS, InvalidConfig):
            return None
        try:
            found = self.converted.run(images, self.nodes, "float32", crowded=False)
        except CONVERSION_ERRORS:
            return dict.fromkeys(self.nodes, float("inf"))
        return {node: relative_distance(found[node], expected[node]) for node in self.nodes}

    def difference_at(self, size: tuple[int, int], count: int) -> str:
        """In what it differs from torch beyond the tolerance; empty if it does not.

        An input that torch refuses is a difference: tracing loses refusals, and then only torch can give them.
        """
        errors = self.errors_at(size, count)
        if errors is None:
            return f"torch takes no {size[0]}x{size[1]}"
        found = max(errors.values(), default=0.0)
        if found <= TOLERANCES["float32"] * MARGIN:
            return ""
        node = next(node for node, error in errors.items() if error == found)
        by = f"differs from torch by {found:.1e}" if math.isfinite(found) else "gives nothing like torch's"
        return f"it {by} at {node}, on {count} of {size[0]}x{size[1]}"


def _images(count: int, channels: int, size: tuple[int, int]) -> FloatArray:
    generator = np.random.default_rng(20240229)
    return generator.standard_normal((count, channels, *size)).astype(np.float32)


def convert(order: Order, planner: Planner, device: OpenVINODevice) -> Facts:
    """Convert one network, compare it with torch, and write it to `order.path`.

    Returns:
        what was found out; a refusal for a network that is slower than torch, unless the order takes it.

    Raises:
        Unconvertible: it cannot be, or differs.
        ServiceError: the config or the checkpoint cannot be loaded (any more).
    """
    started = time.monotonic()
    plan = planner.plan(order.backbone)
    model = build_model(plan, order.weights, CPU)
    nodes = tuple(dict.fromkeys([*planner.computable(plan), *order.nodes]))
    trial, size, divisor = _widest(order, plan, model, nodes, device)
    tried = plan.input_size if size is None else size
    errors = trial.errors_at(tried, 1)
    if errors is None:  # a network that does not take the usual size takes the one that is asked of it
        tried = order.size
        errors = trial.errors_at(tried, 1) or {}
    assert isinstance(model.engine, TorchEngine)
    facts = Facts(
        model_id=order.model_id,
        versions="",
        outcome="converted",
        sha256=trial.sha256,
        nodes=nodes,
        size=size,
        divisor=divisor,
        errors=errors,
        cpu_ms=_timed(trial, tried),
        seconds=round(time.monotonic() - started, 3),
        keys=model.keys,
        missing={node: list(missing) for node in nodes if (missing := model.engine.needs_missing(node))},
    )
    is_wanted = order.whatever_speed or not facts.slowness
    return facts if is_wanted else replace(facts, outcome="refused", reason=facts.slowness)


def _widest(
    order: Order, plan: Plan, model: LoadedModel, nodes: tuple[str, ...], device: OpenVINODevice
) -> tuple[_Trial, tuple[int, int] | None, int]:
    """The conversion that takes most: every size, or those that a divisor allows, or the one that is asked for.

    Tracing at another size than the architecture's own shows the code that runs there (tables of positions are
    resized), which at its own size comes to nothing.
    """
    own = plan.input_size
    near = _affordable(own)
    for traced in () if order.one_size else dict.fromkeys((near, _larger(near), own)):
        try:
            trial = _converted(order, plan, model, nodes, device, traced, fixed=False)
        except Unconvertible:
            continue
        if not any(trial.difference_at(size, count) for size, count in _sizes(own, near)):
            return trial, None, 32 if trial.difference_at((near[0] + 19, near[1] + 10), 1) else 1
    trial = _converted(order, plan, model, nodes, device, order.size, fixed=True)
    if difference := trial.difference_at(order.size, 1) or trial.difference_at(order.size, 3):
        raise Unconvertible(difference)
    return trial, order.size, 1


def _larger(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] + 64, size[1] + 32


def _affordable(own: tuple[int, int]) -> tuple[int, int]:
    """The size that most trials are near to: a network for images of 1024 pixels would take minutes at its own."""
    return own if max(own) <= LARGEST_TRIED else SMALLER


def _sizes(own: tuple[int, int], near: tuple[int, int]) -> Iterator[tuple[tuple[int, int], int]]:
    """Inputs that a network for all sizes is tried at, [height, width] and images of each; all but one near a size."""
    height, width = near
    yield own, 1
    yield near, 3
    yield _larger(near), 2
    yield (height, width + 96), 1
    yield (-(-height // 64) * 32, width), 1


def _converted(
    order: Order,
    plan: Plan,
    model: LoadedModel,
    nodes: tuple[str, ...],
    device: OpenVINODevice,
    traced: tuple[int, int],
    *,
    fixed: bool,
) -> _Trial:
    channels = plan.description.in_channels
    assert isinstance(model.engine, TorchEngine)
    try:
        converted = _trace(_Outputs(model.engine.backbone, nodes), channels, traced, fixed=fixed)
    except (*CONVERSION_ERRORS, InvalidConfig) as error:
        raise Unconvertible(_first_line(error)) from error
    sha256 = _saved(device, converted, order.path)
    del converted
    gc.collect()
    engine = OpenVINOEngine(device, order.path, nodes, {}, room=lambda: 0, sha256=sha256)
    return _Trial(model, nodes, engine, channels, sha256)


def _saved(device: OpenVINODevice, converted: Any, path: Path) -> str:
    """Write a network; a disk that has no room for it says nothing of whether it can be converted."""
    try:
        return device.save(converted, path)
    except OSError as error:
        raise Unavailable(NO_ROOM) from error


def _trace(network: nn.Module, channels: int, size: tuple[int, int], *, fixed: bool) -> Any:
    openvino = load_openvino()
    shape = openvino.PartialShape([-1, channels, *(size if fixed else (-1, -1))])
    example = torch.from_numpy(_images(2, channels, size))
    refusals = frontend_failures()
    with torch.no_grad():
        network(
            example
        )  # what it imports and works out on its first pass must not become a part of the trace
        try:
            converted = openvino.convert_model(network, example_input=example, input=[shape])
        except refusals as error:
            _, found, operators = str(error).rpartition("Conversion is failed for: ")
            what = f"OpenVINO has no operator for {operators.strip()[:200]}" if found else _first_line(error)
            raise Unconvertible(what) from error
    return converted


def frontend_failures() -> tuple[type[Exception], ...]:
    """What OpenVINO's converter raises for what it has no operator for; none of Python's own errors are bases of it."""
    frontend = importlib.import_module("openvino.frontend")
    names = ("OpConversionFailure", "OpValidationFailure", "GeneralFailure", "NotImplementedFailure")
    return tuple(getattr(frontend, name) for name in names)


def _first_line(error: BaseException) -> str:
    """What a library says of a failure, without its traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _timed(trial: _Trial, size: tuple[int, int]) -> dict[str, float]:
    """CPU milliseconds of one image by engine, on one thread: other load does not change them much."""
    images = _images(1, trial.channels, size)
    deepest = trial.nodes[-1:]
    took = {
        engine.name: _cpu_ms(lambda engine=engine: engine.run(images, deepest, "float32", crowded=False))  # type: ignore[misc]
        for engine in (trial.model.engine, trial.converted)
    }
    return {name: round(spent, 3) for name, spent in took.items()}


def _cpu_ms(run: Callable[[], object]) -> float:
    first = _spent_ms(run)
    return first if first > LONG_RUN_MS else statistics.median(_spent_ms(run) for _ in range(TIMED_RUNS))


def _spent_ms(run: Callable[[], object]) -> float:
    started = time.process_time()
    run()
    return (time.process_time() - started) * 1000


def answer(line: bytes, planner: Planner, device: OpenVINODevice) -> Facts:
    """The facts for one order; a refusal where there is no network, a failure where it could not be tried."""
    order = Order.from_line(line)
    nothing = Facts(order.model_id, "", "refused", nodes=order.nodes, size=order.size)
    try:
        return convert(order, planner, device)
    except Unconvertible as error:
        return replace(nothing, reason=str(error))
    except ServiceError as error:
        return replace(nothing, outcome="failed", reason=error.detail)


def _be_first_out_of_memory() -> None:
    """Let the system end this process before the service, where memory runs out; elsewhere than on Linux do nothing."""
    if OUT_OF_MEMORY_SCORE.exists():
        OUT_OF_MEMORY_SCORE.write_text("1000")


def _orders() -> Iterator[bytes]:
    """Orders as they come, one line each. The process ends with its input, whatever it is doing."""
    lines: SimpleQueue[bytes] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin.buffer:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, name="orders", daemon=True).start()
    while True:
        yield lines.get()


def main() -> None:
    """Answer orders until there are no more."""
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    os.nice(LOWEST_PRIORITY)
    _be_first_out_of_memory()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = OpenVINODevice(Threads(1, 1))
    planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(Path()))
    for line in _orders():
        answers.write(answer(line, planner, device).to_json() + b"\n")
        gc.collect()
        return_freed_memory(CPU)


if __name__ == "__main__":
    main()
