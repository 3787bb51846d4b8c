"""The networks of a query: loaded, or converted and loaded, when they are first asked for; leased while in use."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import torch

from service.errors import ModelLoading, UnknownModel
from service.metrics import Metrics
from service.runtime.cache import Entry, ModelCache
from service.runtime.compilation import Compilations
from service.runtime.device import MemoryReturner, budget_bytes, return_freed_memory
from service.runtime.engines.inductor import Shape
from service.runtime.model import (
    LoadedModel,
    LoadedNeck,
    LoadedNetwork,
    Weights,
    build_model,
    build_neck,
    build_plain_neck,
    network_id,
)
from service.runtime.promotion import ArtefactLost, Promotions, Target
from service.runtime.query import Prepared
from service.runtime.report import loading_entry, model_entry
from service.runtime.threads import until
from service.settings import Settings

RETRY_AFTER_S = 5


class Networks:
    """Backbones and necks in memory, on whichever engine answers. Everything here runs on the event loop.

    Attributes:
        cache: what is in memory, of every engine; one budget for all.
        promotions: the way to OpenVINO; None where there is none.
        compilations: the way to compiled code; None where there is none.
    """

    def __init__(self, settings: Settings, device: torch.device, metrics: Metrics) -> None:
        self._device = device
        self._metrics = metrics
        self._loader = ThreadPoolExecutor(1, "loader")
        self._loads: dict[str, dict[str, Any]] = {}
        self._returner = MemoryReturner(device)
        self.cache: ModelCache[LoadedNetwork] = ModelCache(
            budget_bytes=budget_bytes(settings.model_budget, device),
            min_residency_s=settings.min_residency,
            executor=self._loader,
            released=self._returner.ask,
            wait_s=settings.request_timeout,
        )
        self.promotions = Promotions.of(settings, device, self.cache, metrics)
        self.compilations = Compilations.of(settings, device, self.cache, metrics)

    # --- leases ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def leased(
        self, prepared: Prepared, size: tuple[int, int]
    ) -> AsyncIterator[tuple[Entry[LoadedNetwork], LoadedModel, LoadedNeck | None]]:
        """The networks of a query for an input of [height, width]; the deadline ends the wait, not the load.

        Raises:
            ModelLoading: the deadline passed first.
            OutOfMemory, InvalidConfig, CheckpointMismatch: they cannot be loaded.
        """
        plan = prepared.plan
        async with AsyncExitStack() as stack:
            entry = await self._converted(prepared, size, stack) or await self._on_torch(
                prepared, size, stack
            )
            model = entry.model
            assert isinstance(model, LoadedModel)
            model.refuse_unfilled(plan.levels, plan.weights.pointer if plan.weights else "#/backbone")
            yield entry, self._answering(model, prepared, size), await self._neck(prepared, stack)
            self.cache.resize(entry, model.held_bytes)

    def _answering(self, model: LoadedModel, prepared: Prepared, size: tuple[int, int]) -> LoadedModel:
        """The model with the engine that answers; a torch module may have compiled code beside it."""
        if self.compilations is None:
            return model
        return self.compilations.answering(model, _shape(prepared, size))

    async def _converted(
        self, prepared: Prepared, size: tuple[int, int], stack: AsyncExitStack
    ) -> Entry[LoadedNetwork] | None:
        """A lease of the converted network, where there is one for this."""
        if self.promotions is None:
            return None
        target = _target(prepared, size)
        artefact = self.promotions.serving(target)
        if artefact is None:
            async with until(prepared.deadline, partial(_still, "being converted")):
                artefact = await self.promotions.choose(target)
        if artefact is None:
            return None
        load = partial(self.promotions.load, artefact, target)
        self._note_load(artefact.key, prepared.model_id, target.plan.type, target.weights)
        try:
            return await self._lease(artefact.key, artefact.needed_bytes, load, prepared, stack)
        except ArtefactLost as error:
            self.promotions.lost(artefact, prepared.model_id, str(error))
            return None

    async def _on_torch(
        self, prepared: Prepared, size: tuple[int, int], stack: AsyncExitStack
    ) -> Entry[LoadedNetwork]:
        """A lease of the torch module, which may be on its way to another engine."""
        plan, weights, key = prepared.plan, prepared.weights, prepared.model_id
        self._note_load(key, key, plan.type, weights)
        build = partial(build_model, plan, weights, self._device)
        entry = await self._lease(key, plan.description.bytes, build, prepared, stack)
        if self.promotions is not None and isinstance(entry.model, LoadedModel):
            entry.model.samples = self.promotions.samples_of(key)
            stack.callback(self.promotions.answered_by_torch, _target(prepared, size))
        if self.compilations is not None and isinstance(entry.model, LoadedModel):
            hold = partial(self.cache.lease, key, plan.description.bytes, partial(self._counted, build))
            stack.callback(self.compilations.answered, entry.model, _shape(prepared, size), hold)
        return entry

    async def distrust(self, model: LoadedModel, size: tuple[int, int]) -> bool:
        """Answer no more with a converted network that failed on an input of [height, width]; whether torch can."""
        return self.promotions is not None and await self.promotions.distrust(model, size)

    async def _neck(self, prepared: Prepared, stack: AsyncExitStack) -> LoadedNeck | None:
        """The neck of a query. One without weights is made anew: it costs nothing and is in no list."""
        plan, weights = prepared.plan.neck, prepared.neck_weights
        if plan is None:
            return None
        if not plan.description.parameters:
            return build_plain_neck(plan, self._device)
        key = network_id(plan.key, weights)
        self._note_load(key, key, plan.type, weights)
        build = partial(build_neck, plan, weights, self._device)
        entry = await self._lease(key, plan.description.bytes, build, prepared, stack)
        assert isinstance(entry.model, LoadedNeck)
        return entry.model

    async def _lease(
        self,
        key: str,
        needed_bytes: int,
        build: Callable[[], LoadedNetwork],
        prepared: Prepared,
        stack: AsyncExitStack,
    ) -> Entry[LoadedNetwork]:
        client = prepared.query.client
        entry = self.cache.hold(key, client)
        (self._metrics.misses if entry is None else self._metrics.hits).inc()
        if entry is None:
            async with until(prepared.deadline, partial(_still, "loading")):
                entry = await self.cache.acquire(key, needed_bytes, partial(self._counted, build), client)
        stack.callback(self.cache.release, entry)
        return entry

    def _counted(self, build: Callable[[], LoadedNetwork]) -> tuple[LoadedNetwork, int]:
        """A load, counted by how it went."""
        outcome, started = "failed", time.perf_counter()
        try:
            network = build()
            outcome = "loaded"
            self._metrics.load_seconds.observe(time.perf_counter() - started)
        finally:
            self._metrics.loads.labels(outcome).inc()
        return network, network.bytes

    # --- what is there --------------------------------------------------------------------------

    def _note_load(self, key: str, network: str, type_name: str, weights: Weights | None) -> None:
        """Remember what a load is of, for as long as it is under way."""
        if key in self.cache:
            return
        under_way = set(self.cache.loading)
        self._loads = {known: fact for known, fact in self._loads.items() if known in under_way}
        self._loads.setdefault(key, loading_entry(network, type_name, weights))

    def holds(self, network_id: str) -> bool:
        """Whether a network is in memory, on any engine."""
        return any(entry.model.id == network_id for entry in self.cache)

    def evict_idle(self) -> None:
        """Drop what nobody uses and give its memory back; what the device keeps for itself too."""
        self.cache.evict_idle()
        return_freed_memory(self._device)

    def unload(self, network_id: str) -> bool:
        """Take a network out, whatever it runs on; True if it is gone at once, False if it goes with its last user.

        Raises:
            UnknownModel: it is not there.
        """
        keys = [entry.key for entry in self.cache if entry.model.id == network_id]
        if not keys:
            raise UnknownModel("model", network_id)
        at_once = [self.cache.unload(key) for key in keys]
        return all(at_once)

    def describe(self, entry: Entry[LoadedNetwork]) -> dict[str, Any]:
        """A network in memory, as `GET /models` has it."""
        if self.compilations is not None and isinstance(entry.model, LoadedModel):
            return model_entry(entry) | self.compilations.describe(entry.model)
        promotion = self.promotions.describe(entry.model.id) if self.promotions is not None else None
        is_backbone = isinstance(entry.model, LoadedModel)
        return model_entry(entry) | ({"promotion": promotion} if promotion and is_backbone else {})

    def describe_all(self) -> list[dict[str, Any]]:
        """The networks in memory, those used last first."""
        return [self.describe(entry) for entry in sorted(self.cache, key=lambda e: e.used_at, reverse=True)]

    def loading(self) -> list[dict[str, Any]]:
        """The networks that are being loaded."""
        return [self._loads[key] for key in self.cache.loading if key in self._loads]

    async def stop(self) -> None:
        """End the conversions and the loader."""
        if self.promotions is not None:
            await self.promotions.stop()
        if self.compilations is not None:
            await self.compilations.stop()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self._returner.stop()


def _target(prepared: Prepared, size: tuple[int, int]) -> Target:
    return Target(prepared.plan, prepared.weights, prepared.model_id, size)


def _shape(prepared: Prepared, size: tuple[int, int]) -> Shape:
    return Shape.of(prepared.plan.nodes, prepared.query.precision, size)


def _still(doing: str) -> ModelLoading:
    return ModelLoading(f"the model is still {doing}; ask again", retry_after_s=RETRY_AFTER_S)
