"""Raw loops: forward passes of the network alone, without decoding or HTTP: what a server could at most reach."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from benchmarks.jobs import Job
from benchmarks.processes import own_process


@dataclass(frozen=True)
class RawLoop:
    """An engine and how many images it computes at a time."""

    name: str
    engine: str
    streams: int


RAW_OPENVINO = RawLoop("raw loop: OpenVINO, one stream of all cores", "openvino", 1)
RAW_LOOPS = (
    RawLoop("raw loop: torch, all cores", "torch", 1),
    RAW_OPENVINO,
    RawLoop("raw loop: OpenVINO, two streams", "openvino", 2),
)
Spin = Callable[[float], float]
_spin: Spin | None = None  # of this process: set by `prepare`, used by `spin`


def _torch_spin(job: Job) -> Spin:
    import torch

    from benchmarks.networks import SIDE, TorchLevels, physical_cores

    torch.set_num_threads(physical_cores())
    levels, images = TorchLevels(job), torch.randn(1, 3, SIDE, SIDE)
    return _timed(lambda: levels(images), lambda: None)


def _openvino_spin(job: Job, streams: int) -> Spin:
    import numpy as np
    import openvino as ov

    from benchmarks.networks import SIDE, compile_openvino, physical_cores

    options = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": max(streams, physical_cores())}
    network = compile_openvino(job, 1, options)
    images = np.random.default_rng(0).standard_normal((1, 3, SIDE, SIDE), np.float32)
    if streams == 1:
        request = network.create_infer_request()
        return _timed(lambda: request.infer([images], share_inputs=True, share_outputs=True), lambda: None)
    queue = ov.AsyncInferQueue(network, streams)
    return _timed(lambda: queue.start_async([images], share_inputs=True), queue.wait_all)


def _timed(step: Callable[[], object], finish: Callable[[], object]) -> Spin:
    def spin(seconds: float) -> float:
        for _ in range(3):
            step()
        finish()
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            step()
            count += 1
        finish()
        return count / (time.perf_counter() - started)

    return spin


def prepare(job: Job, engine: str, streams: int) -> None:
    """Build the network in this process."""
    global _spin  # noqa: PLW0603  # what a worker process has is its module's
    _spin = _torch_spin(job) if engine == "torch" else _openvino_spin(job, streams)


def spin(seconds: float) -> float:
    """Forward passes a second, over so many seconds, in a process that was prepared."""
    assert _spin is not None
    return _spin(seconds)


def raw_process(loop: RawLoop, job: Job) -> ProcessPoolExecutor:
    """A process of its own for a loop, so that no thread pools mix."""
    return own_process(partial(prepare, job, loop.engine, loop.streams))
