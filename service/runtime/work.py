"""What the device worker does: one forward pass for a batch of requests, then each request's own levels."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from service.config.spec import Layout, Level
from service.errors import ServiceError
from service.necks.base import Neck
from service.protocol.reply import FloatArray
from service.runtime.batcher import Job
from service.runtime.model import LoadedModel, Precision
from service.runtime.plan import SIZE_ERRORS
from service.runtime.postprocess import Pool, normalize_level, pool_level, to_array


@dataclass(frozen=True)
class Work:
    """One request for the device: images [n, c, h, w] float32, and what to make of the levels.

    `names` and `layouts` are those of the levels before pooling. `valid` is each image's
    fraction of height and width that is not padding, None if nothing is padding.
    """

    model: LoadedModel
    neck: Neck | None
    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    levels: tuple[Level, ...]
    prefix_tokens: int
    images: FloatArray
    precision: Precision
    pool: Pool
    normalize: bool
    dtype: Literal["float32", "float16"]
    valid: tuple[tuple[float, float], ...] | None


@dataclass(frozen=True)
class Done:
    """The levels of one request, and where its time went."""

    arrays: tuple[FloatArray, ...]
    queue_s: float
    forward_s: float


WorkJob = Job[Work, Done]


class DeviceRunner:
    """Runs batches of one model on one device."""

    def __init__(self, device: torch.device, max_batch: int) -> None:
        self._device = device
        self._max_batch = max_batch

    def __call__(self, jobs: Sequence[WorkJob]) -> list[Done | BaseException]:
        """Run one batch; the jobs share model, neck, input shape and precision."""
        started = time.monotonic()
        features = self._forward([job.payload for job in jobs])
        results: list[Done | BaseException] = []
        first = 0
        for job in jobs:
            own = {node: feature[first : first + job.images] for node, feature in features.items()}
            first += job.images
            results.append(_finish(job, own, started))
        return results

    def _forward(self, works: Sequence[Work]) -> dict[str, Tensor]:
        """Features of all images; levels that any of the requests asks for."""
        model, precision = works[0].model, works[0].precision
        nodes = tuple(dict.fromkeys(level.node for work in works for level in work.levels))
        images = works[0].images if len(works) == 1 else np.concatenate([work.images for work in works])
        tensor = torch.from_numpy(images)
        chunks = [
            model.run(chunk.to(self._device, non_blocking=True), nodes, precision)
            for chunk in torch.split(tensor, self._max_batch)
        ]
        if len(chunks) == 1:
            return chunks[0]
        return {node: torch.cat([chunk[node] for chunk in chunks]) for node in nodes}


def _finish(job: WorkJob, features: dict[str, Tensor], started: float) -> Done | BaseException:
    """One request's levels; what goes wrong here is its own."""
    work = job.payload
    try:
        with torch.inference_mode():
            arrays = _levels(work, features)
    except (ServiceError, *SIZE_ERRORS) as error:  # a neck does not take every size
        return error
    return Done(arrays, started - job.queued_at, time.monotonic() - started)


def _levels(work: Work, features: dict[str, Tensor]) -> tuple[FloatArray, ...]:
    tensors = [features[level.node] for level in work.levels]
    if work.neck is not None:
        tensors = work.neck(tensors)
    arrays = []
    for name, layout, tensor in zip(work.names, work.layouts, tensors, strict=True):
        pooled = pool_level(tensor, layout, work.pool, work.prefix_tokens, work.valid)
        arrays.append(
            to_array(normalize_level(pooled, layout) if work.normalize else pooled, work.dtype, name)
        )
    return tuple(arrays)
