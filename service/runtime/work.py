"""What the device worker does: one forward pass for a batch of requests, then each request's own levels."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from service.config.spec import Layout, Level, Precision
from service.context import Recorder
from service.errors import DeadlineExceeded, OutOfMemory, ServiceError
from service.necks.base import Neck
from service.protocol.reply import FloatArray
from service.runtime.batcher import Job, Pace
from service.runtime.device_images import Upload
from service.runtime.engines.base import on_device
from service.runtime.host_copies import HostCopy, wait_for_copies
from service.runtime.model import LoadedModel
from service.runtime.plan import SIZE_ERRORS
from service.runtime.postprocess import Pool, normalize_level, pool_level
from service.runtime.shortage import as_shortage, is_shortage


@dataclass(frozen=True)
class Work:
    """One request for the device: images [n, c, h, w], and what to make of the levels.

    The images are float32 on the host, or bytes on their way to the device. `names` and `layouts` are those of the
    levels before pooling. `valid` is each image's fraction of height and width that is not padding, None if nothing
    is padding. `at_once` is how many images a forward pass may hold for the memory that it takes. `recorder` records
    the request, where somebody does.
    """

    model: LoadedModel
    neck: Neck | None
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    levels: tuple[Level, ...]
    prefix_tokens: int
    images: FloatArray | Upload
    precision: Precision
    pool: Pool
    normalize: bool
    dtype: Literal["float32", "float16"]
    valid: tuple[tuple[float, float], ...] | None
    at_once: int
    recorder: Recorder | None = None


@dataclass(frozen=True)
class Done:
    """The levels of one request, and where its time went."""

    arrays: tuple[FloatArray, ...]
    queue_s: float
    forward_s: float


WorkJob = Job[Work, Done]
Begun = tuple[HostCopy, ...] | BaseException


class DeviceRunner:
    """Runs batches, each of one model.

    A batch that finds too little memory is tried once more: with what idle models held, each request by itself, and
    half as many images at once. A request that finds none even then fails alone.

    Args:
        max_batch: images in one forward pass; a request of more is split.
        cores: threads that torch may use.
        make_room: gives back what it can of the device's memory; called on the thread of a lane.
    """

    def __init__(self, max_batch: int, cores: int, make_room: Callable[[], None]) -> None:
        self._max_batch = max_batch
        self._cores = cores
        self._make_room = make_room

    def __call__(self, jobs: Sequence[WorkJob], pace: Pace) -> list[Done | BaseException]:
        """Run one batch; the jobs share model, neck, input shape and precision."""
        started = time.monotonic()
        use_threads(self._threads(jobs[0], pace))
        at_once = min(self._max_batch, sum(job.payload.at_once for job in jobs))
        results = self._tried(jobs, pace, at_once, started)
        short = [index for index, result in enumerate(results) if isinstance(result, OutOfMemory)]
        if short:
            self._make_room()
        for index in short:
            halved = max(1, min(at_once, jobs[index].images) // 2)
            results[index] = self._tried([jobs[index]], pace, halved, started)[0]
        return results

    def _tried(
        self, jobs: Sequence[WorkJob], pace: Pace, at_once: int, started: float
    ) -> list[Done | BaseException]:
        """The results of one attempt, those that found too little memory among them."""
        try:
            return self._run(jobs, pace, at_once, started)
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            return [as_shortage(error) for _ in jobs]

    def _run(
        self, jobs: Sequence[WorkJob], pace: Pace, at_once: int, started: float
    ) -> list[Done | BaseException]:
        features = self._forward(jobs, pace, at_once)
        begun: list[Begun] = []
        first = 0
        for job in jobs:
            own = {node: feature[first : first + job.images] for node, feature in features.items()}
            first += job.images
            begun.append(_begin(job.payload, own))
        wait_for_copies(jobs[0].payload.model.device)
        return [_finish(job, copies, started) for job, copies in zip(jobs, begun, strict=True)]

    def _threads(self, job: WorkJob, pace: Pace) -> int:
        """Threads for torch: beside those of OpenVINO more would only be in the way of both."""
        owns_torch = pace.lane == 0 and not job.concurrent
        gains = job.payload.neck is not None or job.payload.model.engine.gains_by_threads
        return self._cores if owns_torch and gains else 1

    def _forward(self, jobs: Sequence[WorkJob], pace: Pace, at_once: int) -> dict[str, Tensor]:
        """Features of all images; levels that any of the requests asks for.

        Raises:
            DeadlineExceeded: it takes several forward passes, and nobody waits for them any more.
        """
        works = [job.payload for job in jobs]
        model, precision = works[0].model, works[0].precision
        nodes = tuple(dict.fromkeys(level.node for work in works for level in work.levels))
        images = _joined([work.images for work in works])
        chunks = []
        for first in range(0, len(images), at_once):
            if first and not any(job.is_wanted(time.monotonic()) for job in jobs):
                raise DeadlineExceeded("nobody waits any more")
            part = images[first : first + at_once]
            chunks.append(model.engine.run(part, nodes, precision, crowded=pace.crowded))
        if model.samples is not None:
            model.samples.offer(images, chunks[0], precision)
        if len(chunks) == 1:
            return chunks[0]
        return {node: torch.cat([chunk[node] for chunk in chunks]) for node in nodes}


def use_threads(count: int) -> None:
    """Let torch use so many threads in this thread."""
    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@torch.no_grad()
def _joined(parts: Sequence[FloatArray | Upload]) -> FloatArray | Tensor:
    """[n, c, h, w] of all requests: on the host if all are there, else on the device."""
    arrays = [part for part in parts if not isinstance(part, Upload)]
    if len(arrays) == len(parts):
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
    tensors = [part.images() if isinstance(part, Upload) else torch.from_numpy(part) for part in parts]
    device = next(part.device for part in parts if isinstance(part, Upload))
    return torch.cat([on_device(tensor, device) for tensor in tensors]) if len(tensors) > 1 else tensors[0]


def _begin(work: Work, features: dict[str, Tensor]) -> Begun:
    """One request's levels on their way to the host; what goes wrong here is its own."""
    try:
        with torch.inference_mode():
            return _levels(work, features)
    except (ServiceError, MemoryError, *SIZE_ERRORS) as error:  # a neck does not take every size
        return as_shortage(error) if is_shortage(error) else error


def _finish(job: WorkJob, begun: Begun, started: float) -> Done | BaseException:
    """One request's answer."""
    if isinstance(begun, BaseException):
        return begun
    try:
        arrays = tuple(copy.array() for copy in begun)
    except ServiceError as error:
        return error
    return Done(arrays, started - job.queued_at, time.monotonic() - started)


def _levels(work: Work, features: dict[str, Tensor]) -> tuple[HostCopy, ...]:
    tensors = [features[level.node] for level in work.levels]
    if work.neck is not None:
        tensors = work.neck(tensors)
    copies = []
    for name, layout, tensor in zip(work.names, work.layouts, tensors, strict=True):
        pooled = pool_level(tensor, layout, work.pool, work.prefix_tokens, work.valid)
        copies.append(
            HostCopy(normalize_level(pooled, layout) if work.normalize else pooled, work.dtype, name)
        )
    return tuple(copies)
