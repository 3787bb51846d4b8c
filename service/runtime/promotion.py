"""From torch to the fastest engine of the device, in the background, while torch answers.

A model starts on torch. After its first requests it is converted by a process of its own, compared with what torch
answered to those requests, and from then on answered by the other engine; what torch held is given back. A model that
cannot be converted, differs or is slower stays on torch, and says why.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from service.errors import CannotStart, InvalidConfig, ServiceError
from service.metrics import Metrics
from service.runtime.cache import ModelCache
from service.runtime.device import available_cores, free_bytes
from service.runtime.engines.artefacts import Artefact, ArtefactStore
from service.runtime.engines.base import FIRST_REQUESTS, RECORDS_KEPT, State
from service.runtime.engines.comparison import difference
from service.runtime.engines.conversion import ConversionFailed, Converter, NoLongerWanted
from service.runtime.engines.openvino_engine import (
    DamagedNetworkError,
    OpenVINODevice,
    OpenVINOEngine,
    Threads,
)
from service.runtime.engines.orders import Order
from service.runtime.engines.samples import Samples
from service.runtime.model import LoadedModel, LoadedNetwork, Weights
from service.runtime.plan import Plan
from service.runtime.threads import on_thread
from service.settings import Settings

# Converted networks of one model that are bound to one input size.
MAX_SIZES = 4
# Input sizes that torch lately answered for one model.
SIZES_REMEMBERED = 16
# What the converter takes, about: for its libraries, and for each byte of weights.
CONVERTER_BYTES, CONVERTER_BYTES_PER_WEIGHT = 700_000_000, 6
# Models that are being converted or wait for it.
MAX_UNDER_WAY = 8
# What OpenVINO raises when it reads or runs a network.
ENGINE_ERRORS = (RuntimeError, ValueError, TypeError, OSError)
DAMAGED = "the files of its converted network were damaged"
LOST = "the files of its converted network cannot be read"
CPU = torch.device("cpu")
log = logging.getLogger("service.engines")
Asked = tuple[tuple[str, ...], tuple[int, int]]


class EngineFailed(Exception):
    """A converted network that was promoted failed on an input that torch takes."""


class ArtefactLost(Exception):
    """A converted network that can no longer be read."""


@dataclass(frozen=True)
class Target:
    """What a request asks of a model: features at one [height, width]."""

    plan: Plan
    weights: Weights | None
    model_id: str
    size: tuple[int, int]

    @property
    def asked(self) -> Asked:
        """What decides, of a request, which converted network can answer it: features and [height, width]."""
        return self.plan.nodes, self.size


@dataclass
class _Record:
    """What is known of one model."""

    state: State = "waiting"
    reason: str = ""
    requests: int = 0
    is_looked_up: bool = False
    artefacts: list[Artefact] = field(default_factory=list)
    samples: Samples = field(default_factory=Samples)
    on_torch: OrderedDict[tuple[int, int], Target] = field(default_factory=OrderedDict)
    task: asyncio.Task[None] | None = None
    converting_for: Asked | None = None

    def serving(self, target: Target) -> Artefact | None:
        """The converted network that answers for a target, if there is one."""
        nodes, size = target.plan.nodes, target.size
        return next((known for known in self.artefacts if known.facts.serves(nodes, size)), None)

    def refusal(self, target: Target) -> Artefact | None:
        """The finding that there is none for a target."""
        nodes, size = target.plan.nodes, target.size
        return next((known for known in self.artefacts if known.facts.covers(nodes, size)), None)

    def is_settled(self, target: Target) -> bool:
        """Whether it is known if a target can be converted at all; that it was too slow says nothing of that."""
        if self.serving(target) is not None:
            return True
        refusal = self.refusal(target)
        return refusal is not None and not refusal.facts.slowness


class Promotions:
    """The way of every model from torch to OpenVINO. Everything here runs on the event loop, files and networks not.

    Args:
        is_required: whether models are converted before their first answer, and refused if they cannot be.
        cache: where networks are held, of either engine; they share its budget.
    """

    def __init__(
        self,
        device: OpenVINODevice,
        store: ArtefactStore,
        cache: ModelCache[LoadedNetwork],
        metrics: Metrics,
        *,
        is_required: bool,
    ) -> None:
        self._device = device
        self._store = store
        self._cache = cache
        self._metrics = metrics
        self._is_required = is_required
        self._converter = Converter()
        self._thread = ThreadPoolExecutor(1, "promotion")
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._under_way: set[asyncio.Task[None]] = set()

    @classmethod
    def of(
        cls, settings: Settings, device: torch.device, cache: ModelCache[LoadedNetwork], metrics: Metrics
    ) -> Promotions | None:
        """The promotions that the settings ask for; None where torch answers everything.

        Raises:
            CannotStart: the engine that is set does not run on the device.
        """
        if settings.engine == "openvino" and device.type != "cpu":
            raise CannotStart(f"engine openvino runs on the CPU, not on {device}")
        if settings.engine not in ("auto", "openvino") or device.type != "cpu":
            return None
        if find_spec("openvino") is None:  # there are processors that it is not built for
            if settings.engine == "openvino":
                raise CannotStart("engine openvino is not installed on this machine")
            return None
        store = ArtefactStore(settings.engine_cache, settings.engine_cache_bytes)
        openvino = OpenVINODevice(Threads.of(available_cores()))
        return cls(openvino, store, cache, metrics, is_required=settings.engine == "openvino")

    # --- which engine answers -------------------------------------------------------------------

    def serving(self, target: Target) -> Artefact | None:
        """As `choose`, as far as is known without a look at the disk or a conversion."""
        record = self._records.get(target.model_id)
        artefact = None if record is None else record.serving(target)
        if artefact is None or not (artefact.facts.compared or self._is_required):
            return None
        self._records.move_to_end(target.model_id)
        return artefact

    async def choose(self, target: Target) -> Artefact | None:
        """The converted network that answers a request; None where torch does.

        Raises:
            InvalidConfig: conversion is required and this model cannot be.
        """
        record = self._record(target.model_id)
        if not record.is_looked_up:
            known = await on_thread(self._thread, self._store.known, target.model_id)
            if not record.is_looked_up:
                record.is_looked_up = True
                record.artefacts.extend(known)
        if self._is_required:
            await self._require(record, target)
        artefact = self.serving(target)
        if artefact is not None:
            record.state, record.reason = "promoted", ""
        return artefact

    async def _require(self, record: _Record, target: Target) -> None:
        while not record.is_settled(target):
            task = record.task or self._begin(record, target)
            is_own = record.converting_for == target.asked
            await asyncio.shield(task)
            if is_own:
                break
        if record.serving(target) is None:
            refusal = record.refusal(target)
            reason = record.reason if refusal is None else refusal.facts.reason
            raise InvalidConfig("#/backbone", f"{target.plan.type} does not run on OpenVINO: {reason}")

    def _record(self, model_id: str) -> _Record:
        record = self._records.setdefault(model_id, _Record())
        self._records.move_to_end(model_id)
        while len(self._records) > RECORDS_KEPT:
            self._records.popitem(last=False)
        return record

    def load(self, artefact: Artefact, target: Target) -> LoadedModel:
        """A converted network in memory.

        Raises:
            ArtefactLost: its files cannot be read.
        """
        facts, weights = artefact.facts, target.weights
        try:
            engine = OpenVINOEngine(
                self._device, artefact.path, facts.nodes, facts.missing, self._room, facts.sha256
            )
        except DamagedNetworkError as error:
            self._store.remove(artefact)
            raise ArtefactLost(DAMAGED) from error
        except ENGINE_ERRORS as error:
            raise ArtefactLost(LOST) from error
        self._store.touch(artefact)
        file = None if weights is None else weights.file
        return LoadedModel(target.model_id, target.plan.type, engine.bytes, CPU, file, facts.keys, engine)

    def _sized(self, artefact: Artefact, target: Target) -> tuple[LoadedNetwork, int]:
        model = self.load(artefact, target)
        return model, model.bytes

    def _room(self) -> int:
        return self._cache.budget_bytes - self._cache.used_bytes

    def lost(self, artefact: Artefact, model_id: str, reason: str) -> None:
        """Forget a converted network whose files cannot be read; it is made again after some more requests."""
        log.warning("a converted network of the engine cache: %s", reason)
        record = self._record(model_id)
        record.artefacts = [known for known in record.artefacts if known.key != artefact.key]
        record.state, record.reason = "waiting", reason

    async def distrust(self, model: LoadedModel, size: tuple[int, int]) -> bool:
        """Give up the converted networks of a model, one of which failed on an input of [height, width].

        Returns:
            whether torch answers from now on; where OpenVINO is required nothing else may.
        """
        if self._is_required or model.engine.name != OpenVINOEngine.name:
            return False
        record = self._record(model.id)
        reason = f"it failed on a request of {size[0]}x{size[1]}"
        log.error("%s on OpenVINO: %s", model.type, reason)
        # No request may choose them while their files are removed.
        failed, record.artefacts = record.artefacts, []
        record.state, record.reason = "stays", reason
        self._metrics.promotions.labels("failed").inc()
        given_up = [await self._given_up(known, reason) for known in failed]
        record.artefacts.extend(given_up)
        return True

    async def _given_up(self, artefact: Artefact, reason: str) -> Artefact:
        if artefact.key in self._cache:
            self._cache.unload(artefact.key)
        return await on_thread(self._thread, self._store.refused, artefact, reason)

    # --- on the way -----------------------------------------------------------------------------

    def samples_of(self, model_id: str) -> Samples | None:
        """Where torch's answers of a model are kept, as long as they are wanted."""
        record = self._record(model_id)
        return None if record.state == "stays" else record.samples

    def answered_by_torch(self, target: Target) -> None:
        """Note a request that torch answered; the model's way begins after the first few."""
        record = self._record(target.model_id)
        record.requests += 1
        record.on_torch[target.size] = target
        while len(record.on_torch) > SIZES_REMEMBERED:
            record.on_torch.popitem(last=False)
        refusal = record.refusal(target)
        if refusal is not None and refusal.facts.outcome == "refused":
            record.state, record.reason = "stays", refusal.facts.reason
        if refusal is None or not refusal.facts.compared:
            self._begin_if_due(record, target)

    def _begin_if_due(self, record: _Record, target: Target) -> None:
        of_one_size = sum(1 for known in record.artefacts if known.facts.size is not None)
        is_free = record.task is None and record.state != "stays"
        if not (is_free and record.requests >= FIRST_REQUESTS and of_one_size < MAX_SIZES):
            return
        if len(self._under_way) >= MAX_UNDER_WAY:
            return
        record.reason = self._obstacle(target)
        if not record.reason:
            self._begin(record, target)

    def _obstacle(self, target: Target) -> str:
        """Why a model cannot go over now; empty if it can."""
        if not self._fits(target):
            return "the budget has no room for it beside the other models"
        weight_bytes = target.plan.description.bytes
        if free_bytes(CPU) < CONVERTER_BYTES + CONVERTER_BYTES_PER_WEIGHT * weight_bytes:  # asks the system
            return "there is too little free memory to convert it"
        if not self._store.has_room(weight_bytes):
            return "the engine cache has no room on its disk for it"
        return ""

    def _fits(self, target: Target) -> bool:
        """Whether a model can go over without others having to go: what torch holds of it is given back after."""
        held = sum(entry.bytes for entry in self._cache if entry.key == target.model_id)
        needed = OpenVINOEngine.estimated_bytes(target.plan.description.bytes, 1)
        return self._cache.used_bytes - held + needed <= self._cache.budget_bytes

    def _begin(self, record: _Record, target: Target) -> asyncio.Task[None]:
        record.converting_for = target.asked
        record.task = asyncio.create_task(self._promote(record, target))
        self._under_way.add(record.task)
        record.task.add_done_callback(partial(self._ended, record))
        return record.task

    def _ended(self, record: _Record, task: asyncio.Task[None]) -> None:
        self._under_way.discard(task)
        record.task = None
        record.requests = 0
        record.samples = Samples()
        if not task.cancelled() and (error := task.exception()) is not None:
            record.state, record.reason = "stays", "it could not be converted this time"
            self._metrics.promotions.labels("failed").inc()
            log.error("promoting failed", exc_info=error)

    async def _promote(self, record: _Record, target: Target) -> None:
        try:
            artefact = record.serving(target) or await self._converted(record, target)
            unwanted = self._unwanted(artefact)
            if not unwanted and not artefact.facts.compared:
                record.state = "comparing"
                artefact = await self._compared(record, artefact, target)
                unwanted = artefact.facts.reason
        except NoLongerWanted:
            return
        except (ConversionFailed, ServiceError, ArtefactLost) as error:
            reason = error.detail if isinstance(error, ServiceError) else str(error)
            record.state, record.reason = "stays", reason
            self._metrics.promotions.labels("failed").inc()
            return
        record.artefacts = [known for known in record.artefacts if known.key != artefact.key] + [artefact]
        if unwanted:
            record.state, record.reason = "stays", unwanted
            self._metrics.promotions.labels("refused").inc()
            return
        if not artefact.facts.compared and not self._is_required:
            record.state = "waiting"  # for a request of a size that it takes
            return
        record.state, record.reason = "promoted", ""
        self._metrics.promotions.labels("promoted").inc()
        self._give_back(record, target.model_id)

    def _unwanted(self, artefact: Artefact) -> str:
        """Why a network does not answer; empty if it may. A slower one does where nothing else is to answer."""
        return artefact.facts.reason or ("" if self._is_required else artefact.facts.slowness)

    async def _converted(self, record: _Record, target: Target) -> Artefact:
        """A conversion, in its turn, unless the model has had to make room for others meanwhile."""

        def is_wanted() -> bool:
            is_here = self._is_required or target.model_id in self._cache
            record.state = "converting" if is_here else "waiting"
            return is_here

        path = self._store.new_path()
        order = Order.of(
            target.plan,
            target.model_id,
            target.weights,
            target.size,
            path,
            whatever_speed=self._is_required,
        )
        try:
            facts = await self._converter.convert(order, is_wanted)
            made = path if facts.outcome == "converted" else None
            return await on_thread(self._thread, self._store.keep, facts, made)
        finally:
            await on_thread(self._thread, _remove, path)

    async def _compared(self, record: _Record, artefact: Artefact, target: Target) -> Artefact:
        """The artefact, confirmed or refused by what torch answered to real requests."""
        samples = [
            sample
            for sample in record.samples.all()
            if artefact.facts.serves(tuple(sample.features), sample.size)
        ]
        if not samples:
            return artefact
        async with self._cache.lease(
            artefact.key, artefact.needed_bytes, partial(self._sized, artefact, target)
        ) as entry:
            assert isinstance(entry.model, LoadedModel)
            differing = await on_thread(self._thread, difference, entry.model.engine, samples)
        if differing is None:
            return await on_thread(self._thread, self._store.confirmed, artefact)
        self._cache.unload(artefact.key)
        return await on_thread(self._thread, self._store.refused, artefact, differing)

    def _give_back(self, record: _Record, model_id: str) -> None:
        """Drop torch's weights once nothing that was lately asked of them needs them; they can be loaded again."""
        needed = [target for target in record.on_torch.values() if record.serving(target) is None]
        record.on_torch.clear()
        if not needed and model_id in self._cache:
            self._cache.unload(model_id)

    # --- for whoever asks -----------------------------------------------------------------------

    def describe(self, model_id: str) -> dict[str, Any] | None:
        """How far a model is on its way, as `GET /models` has it."""
        record = self._records.get(model_id)
        if record is None:
            return None
        return {"state": record.state, **({"reason": record.reason} if record.reason else {})}

    async def stop(self) -> None:
        """End the converter and whatever waits for it."""
        self._converter.kill()
        tasks = tuple(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._store.close()


def _remove(path: Path) -> None:
    """What a conversion left that was not kept."""
    for suffix in (".xml", ".bin"):
        path.with_suffix(suffix).unlink(missing_ok=True)
