"""From torch to code compiled for single shapes, in the background, while torch answers.

A model starts on torch. What is asked of it a few times, the same features at one size and precision, is compiled on a
thread of its own, compared with torch on an image of those requests, and from then on answered by compiled code; torch
goes on answering the rest, from the same weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from service.errors import CannotStart, ServiceError
from service.metrics import Metrics
from service.protocol.reply import FloatArray
from service.runtime.cache import Entry, ModelCache
from service.runtime.device import available_cores
from service.runtime.engines.base import FIRST_REQUESTS, RECORDS_KEPT, State
from service.runtime.engines.inductor import CompiledBatch, InductorEngine, Shape, bucket_of
from service.runtime.engines.samples import Samples
from service.runtime.engines.torch_engine import TorchEngine
from service.runtime.model import LoadedModel, LoadedNetwork
from service.runtime.threads import on_thread
from service.settings import Settings

Hold = Callable[[], AbstractAsyncContextManager[Entry[LoadedNetwork]]]
SHAPES_REMEMBERED = 256
# What torch raises where it cannot compile something; most of it is a RuntimeError of its own.
COMPILE_ERRORS = (RuntimeError, ValueError, TypeError, OSError)
log = logging.getLogger("service.engines")


class CompilationFailed(Exception):
    """What does not compile, in a few words."""


class Differs(Exception):
    """Compiled code gives other numbers; says where."""


@dataclass
class _Record:
    """What is known of one model. `doing` is what its task does."""

    doing: State = "converting"
    requests: OrderedDict[Shape, int] = field(default_factory=OrderedDict)
    refused: OrderedDict[Shape, str] = field(default_factory=OrderedDict)
    samples: Samples = field(default_factory=Samples)
    task: asyncio.Task[None] | None = None

    def count(self, shape: Shape) -> int:
        """One more request of a shape; how many there were."""
        self.requests[shape] = self.requests.get(shape, 0) + 1
        self.requests.move_to_end(shape)
        _shorten(self.requests)
        return self.requests[shape]

    def refuse(self, shape: Shape, reason: str) -> None:
        """Do not try a shape again."""
        self.refused[shape] = reason
        _shorten(self.refused)


class Compilations:
    """The way of every model from torch to inductor. Everything here runs on the event loop, compiling does not.

    One model's shapes take turns, and so do models: one thread compiles. It leaves the device's thread alone, but
    torch traces networks in Python, under the lock that requests need too.

    Args:
        cache: where the models are; nothing more is compiled once its budget is used up.
        max_batch: images in one forward pass.
        cores: threads that torch uses on the device's thread: part of what is compiled.
    """

    def __init__(
        self, cache: ModelCache[LoadedNetwork], metrics: Metrics, *, max_batch: int, cores: int
    ) -> None:
        self._cache = cache
        self._metrics = metrics
        self._max_batch = max_batch
        self._thread = ThreadPoolExecutor(1, "compilation", partial(torch.set_num_threads, cores))
        self._records: OrderedDict[str, _Record] = OrderedDict()

    @classmethod
    def of(
        cls, settings: Settings, device: torch.device, cache: ModelCache[LoadedNetwork], metrics: Metrics
    ) -> Compilations | None:
        """What the settings ask for; None where nothing is compiled.

        Raises:
            CannotStart: the engine that is set does not run on the device.
        """
        if settings.engine == "inductor" and device.type not in ("cuda", "cpu"):
            raise CannotStart(
                f"BACKBONE_ENGINE: engine inductor runs on CUDA and on the CPU, not on {device}"
            )
        if settings.engine == "inductor" or (settings.engine == "auto" and device.type == "cuda"):
            return cls(cache, metrics, max_batch=settings.max_batch, cores=available_cores())
        return None

    # --- which engine answers -------------------------------------------------------------------

    def answering(self, model: LoadedModel, shape: Shape) -> LoadedModel:
        """A model as it answers requests of a shape: by compiled code if there is some, else by torch."""
        model.samples = self._record(model.id).samples  # of compiled code only the image is used
        if model.compiled is not None and model.compiled.serves(shape):
            return replace(model, engine=model.compiled)
        return model

    def _record(self, model_id: str) -> _Record:
        record = self._records.setdefault(model_id, _Record())
        self._records.move_to_end(model_id)
        _shorten(self._records, RECORDS_KEPT)
        return record

    # --- on the way -----------------------------------------------------------------------------

    def answered(self, model: LoadedModel, shape: Shape, hold: Hold) -> None:
        """Note a request that was answered, and begin to compile what it would have been worth.

        Args:
            hold: leases the model.
        """
        record = self._record(model.id)
        if (
            record.task is not None
            or shape in record.refused
            or self._cache.used_bytes > self._cache.budget_bytes
        ):
            return
        sample = record.samples.of(shape.size, shape.precision)
        buckets = self._wanted(record, model.compiled, shape)
        if buckets and sample is not None:
            task = asyncio.create_task(self._compile(model.id, shape, buckets, sample.images, hold))
            record.task = task
            task.add_done_callback(partial(self._ended, record, shape))

    def _wanted(self, record: _Record, compiled: InductorEngine | None, shape: Shape) -> list[int]:
        """For how many images a shape should be compiled now, smallest first."""
        if compiled is not None and compiled.serves(shape):
            return sorted(compiled.missed(shape))[:1]
        has_room = compiled is None or compiled.has_room(shape)
        if record.count(shape) < FIRST_REQUESTS or not has_room:
            return []
        batches = record.samples.batches(shape.size, shape.precision)
        return sorted({bucket_of(images, self._max_batch) for images in batches})

    def _ended(self, record: _Record, shape: Shape, task: asyncio.Task[None]) -> None:
        record.task = None
        record.requests.pop(shape, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            record.refuse(shape, "it could not be compiled this time")
            self._metrics.promotions.labels("failed").inc()
            log.error("compiling failed", exc_info=error)

    async def _compile(
        self, model_id: str, shape: Shape, buckets: Iterable[int], image: FloatArray, hold: Hold
    ) -> None:
        if model_id not in self._cache:
            return  # unloaded meanwhile: it is not loaded again for this
        record = self._record(model_id)
        try:
            async with hold() as entry:
                assert isinstance(entry.model, LoadedModel)
                await self._add(record, entry.model, shape, buckets, image)
                self._cache.resize(entry, entry.model.held_bytes)
        except (Differs, CompilationFailed, ServiceError) as error:
            record.refuse(shape, error.detail if isinstance(error, ServiceError) else str(error))
            self._metrics.promotions.labels("refused" if isinstance(error, Differs) else "failed").inc()
            return
        self._metrics.promotions.labels("promoted").inc()

    async def _add(
        self, record: _Record, model: LoadedModel, shape: Shape, buckets: Iterable[int], image: FloatArray
    ) -> None:
        """Compile, compare, and let it answer."""
        assert isinstance(model.engine, TorchEngine)
        engine = model.compiled or InductorEngine(model.engine, self._max_batch)
        made: dict[int, CompiledBatch] = {}
        for bucket in buckets:
            record.doing = "converting"
            made[bucket] = await on_thread(self._thread, _compiled, engine, shape, bucket, image)
            record.doing = "comparing"
            await on_thread(self._thread, _refuse_difference, engine, shape, bucket, made[bucket], image)
        engine.publish(shape, made)
        model.compiled = engine

    # --- for whoever asks -----------------------------------------------------------------------

    def describe(self, model: LoadedModel) -> dict[str, Any]:
        """How far a model in memory is on its way, as `GET /models` has it; what is under way comes first."""
        record = self._records.get(model.id) or _Record()
        is_compiled = model.compiled is not None and model.compiled.shapes > 0
        reason = next(reversed(record.refused.values()), "")
        state: State = "promoted" if is_compiled else "stays" if reason else "waiting"
        promotion: dict[str, str] = {"state": state if record.task is None else record.doing}
        if reason:
            promotion["reason"] = reason
        return {"engine": "inductor" if is_compiled else "torch", "promotion": promotion}

    async def stop(self) -> None:
        """Leave whatever is being compiled; the thread ends with it."""
        tasks = [record.task for record in self._records.values() if record.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)


def _compiled(engine: InductorEngine, shape: Shape, bucket: int, image: FloatArray) -> CompiledBatch:
    try:
        return engine.compile(shape, bucket, image)
    except COMPILE_ERRORS as error:
        log.warning("%s does not compile", shape, exc_info=True)
        raise CompilationFailed(
            f"torch.compile ended with {type(error).__name__} on {_words(shape)}"
        ) from error


def _refuse_difference(
    engine: InductorEngine, shape: Shape, bucket: int, batch: CompiledBatch, image: FloatArray
) -> None:
    try:
        difference = engine.difference(shape, bucket, batch, image)
    except COMPILE_ERRORS as error:
        log.warning("compiled code of %s does not run", shape, exc_info=True)
        raise CompilationFailed(
            f"compiled code ended with {type(error).__name__} on {_words(shape)}"
        ) from error
    if difference is not None:
        raise Differs(difference)


def _words(shape: Shape) -> str:
    height, width = shape.size
    return f"inputs of {height}x{width} at {shape.precision}"


def _shorten(known: OrderedDict[Any, Any], length: int = SHAPES_REMEMBERED) -> None:
    while len(known) > length:
        known.popitem(last=False)
