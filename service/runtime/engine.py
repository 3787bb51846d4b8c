"""The engine: from a request for features to arrays, over the planner, the model cache and the device worker."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from service.backbones.catalogue import backbone_registry
from service.checkpoints.resolve import CheckpointStore
from service.config.files import ConfigCatalogue, named_in_errors
from service.config.preprocess import parse_preprocess, resolve_preprocess
from service.config.spec import WeightsRef
from service.errors import DeadlineExceeded, ModelLoading, ServiceError
from service.metrics import Metrics
from service.necks.catalogue import neck_registry
from service.protocol.reply import FeatureReply, Timings
from service.runtime.batcher import Batcher
from service.runtime.cache import Entry, ModelCache
from service.runtime.device import (
    budget_bytes,
    pick_device,
    return_freed_memory,
)
from service.runtime.fetches import Fetches
from service.runtime.hub_models import is_hub_model, with_architecture
from service.runtime.intake import Batch, Intake, Limits
from service.runtime.model import (
    NECK_PREFIX,
    LoadedModel,
    LoadedNeck,
    LoadedNetwork,
    Weights,
    build_model,
    build_neck,
    build_plain_neck,
    network_id,
)
from service.runtime.plan import (
    SIZE_ERRORS,
    SIZE_POINTER,
    LevelShape,
    Plan,
    Planner,
    pooled_shapes,
)
from service.runtime.postprocess import refuse_pool
from service.runtime.query import FeatureQuery, Prepared, fingerprint
from service.runtime.report import loading_entry, model_entry, model_info, reply_levels
from service.runtime.threads import on_thread, until
from service.runtime.work import DeviceRunner, Done, Work, WorkJob
from service.settings import Settings

P = ParamSpec("P")
T = TypeVar("T")
Shapes = Sequence[tuple[int, ...]]
STUCK_AFTER_S = 120.0
CONNECT_TIMEOUT_S = 3.0
log = logging.getLogger("service.engine")


class Engine:
    """Everything behind the API. Call `start` and `stop` inside a running event loop."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self.metrics = metrics
        self.draining = False
        self.device = pick_device(settings.device)
        self.planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(settings.config_dir))
        self.store = _checkpoint_store(settings)
        self._codecs = ThreadPoolExecutor(settings.decode_threads or os.cpu_count() or 1, "codec")
        self._plans = ThreadPoolExecutor(2, "planner")
        self._fetches = ThreadPoolExecutor(4, "fetch")
        self._loader = ThreadPoolExecutor(1, "loader")
        self.checkpoints = Fetches(self.store, self._fetches)
        limits = Limits(settings.max_pixels, settings.max_images, settings.max_body_bytes // 4)
        self._intake = Intake(self._codecs, limits)
        self.cache: ModelCache[LoadedNetwork] = ModelCache(
            budget_bytes=budget_bytes(settings.model_budget, self.device),
            min_residency_s=settings.min_residency,
            executor=self._loader,
            released=lambda: return_freed_memory(self.device),
            wait_s=settings.request_timeout,
        )
        self.batcher: Batcher[Work, Done] = Batcher(
            DeviceRunner(self.device, settings.max_batch),
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            observe=self._observe_batch,
        )
        self._loads: dict[str, dict[str, Any]] = {}
        self._warming: asyncio.Task[None] | None = None
        self._not_warm: str | None = "models are being loaded" if settings.warm else None

    # --- features -------------------------------------------------------------------------------

    async def prepare(self, query: FeatureQuery, extra: str = "") -> Prepared:
        """Resolve a query: config, preprocessing, weights. Nothing is decoded, loaded or computed.

        Args:
            extra: whatever else decides the bytes of the reply; it goes into the fingerprint.
        """
        deadline = time.monotonic() + self.settings.request_timeout
        async with until(
            deadline, DeadlineExceeded("the deadline passed while the config was being resolved")
        ):
            plan = await self.plan(query.backbone, query.neck, query.preprocess)
            defaults = [plan.config.input_defaults(), plan.description.input]
            with named_in_errors(_name(query.backbone)):
                spec = resolve_preprocess(parse_preprocess(plan.preprocess), defaults)
        weights = await self._found(plan.weights, plan.type, deadline)
        neck_type = plan.type if plan.neck is None else plan.neck.type
        neck_weights = await self._found(_neck_ref(plan), neck_type, deadline)
        identity = network_id(plan.config.key(), weights)
        parts = (query, plan, spec, identity, neck_weights, extra)
        digest = await on_thread(self._codecs, fingerprint, *parts)
        return Prepared(query, plan, spec, weights, neck_weights, identity, digest, deadline)

    async def plan(self, backbone: Any, neck: Any = None, preprocess: Any = None) -> Plan:
        """A config, or the name of one, resolved.

        Raises:
            UnknownBackbone, UnknownConfig, InvalidConfig: what is wrong and where.
        """
        with named_in_errors(_name(backbone)):
            if isinstance(backbone, str):
                named = on_thread(self._codecs, self.planner.named, backbone, neck, preprocess)
                backbone, neck, preprocess = await named
            if is_hub_model(backbone):
                backbone = await on_thread(self._fetches, with_architecture, backbone, self.store)
            # A config that is known does not wait behind one that must be built on the meta device.
            known = self.planner.known(backbone, neck, preprocess)
            if known is not None:
                return known
            return await self.planning(self.planner.plan, backbone, neck, preprocess)

    async def planning(self, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs) -> T:
        """Run something that may build an architecture on the meta device."""
        return await on_thread(self._plans, function, *arguments, **keywords)

    async def _found(self, ref: WeightsRef | None, type_name: str, deadline: float) -> Weights | None:
        """The checkpoint that was asked for. The deadline ends the wait, not a download that goes on."""
        if ref is None:
            return None
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return Weights(ref, await self.checkpoints.find(ref, type_name))
        except TimeoutError as error:
            raise self.checkpoints.too_late(ref) from error

    async def extract(
        self, prepared: Prepared, refuse_reply: Callable[[Shapes, Sequence[str]], None]
    ) -> FeatureReply:
        """Decode, run, and describe the levels of a prepared query.

        Args:
            refuse_reply: given the shapes and names of the levels before anything is computed; raises if they
                make no reply that may be sent.
        """
        late = DeadlineExceeded(f"the request took longer than {self.settings.request_timeout:g} s")
        clock = _Clock()
        async with until(prepared.deadline, late):
            batch = await self._batch(prepared)
            levels = await self._levels(prepared, batch)
            shapes = pooled_shapes(levels, len(batch.infos), prepared.query.pool)
            refuse_reply(shapes, [level.fact.name for level in levels])
        clock.lap("decode")
        async with self._leased(prepared) as (_, model, neck):
            clock.lap("load")
            async with until(prepared.deadline, late):
                done = await self._compute(prepared, batch, levels, model, neck)
            clock.note("queue", done.queue_s)
            clock.note("forward", done.forward_s)
            described = model_info(prepared, model, neck)
        self._observe_stages(clock.seconds)
        return FeatureReply(
            model=described,
            images=batch.infos,
            levels=reply_levels(levels, done.arrays, prepared.query.pool),
            timings=Timings(**{stage: seconds * 1000 for stage, seconds in clock.seconds.items()}),
            preprocess=None if prepared.query.tensor is not None else prepared.spec.as_json(),
        )

    async def encode(self, encode: Callable[[], T]) -> T:
        """Run an encoder off the event loop."""
        return await on_thread(self._codecs, encode)

    async def _batch(self, prepared: Prepared) -> Batch:
        query, channels = prepared.query, prepared.plan.description.in_channels
        if query.tensor is not None:
            return await self._intake.tensor(query.tensor, channels)
        return await self._intake.images(query.images, prepared.spec, channels)

    async def _levels(self, prepared: Prepared, batch: Batch) -> tuple[LevelShape, ...]:
        """What the levels will be. What cannot run is refused here, before a model is loaded for it."""
        plan = prepared.plan
        height, width = batch.images.shape[2:]
        made_for = plan.input_size
        # A small image may be too small for some of the levels only, and would fail its neighbours in the batch.
        is_small = height < made_for[0] or width < made_for[1]
        exact = is_small or prepared.query.tensor is not None or prepared.spec.mode != "native"
        levels = self.planner.known_levels(plan, (height, width))
        if levels is None and exact:
            pointer = _size_pointer(prepared.query)
            levels = await self.planning(self.planner.levels_at, plan, (height, width), pointer)
        elif levels is None:
            levels = await self.planning(self.planner.levels_near, plan, (height, width))
        refuse_pool(prepared.query.pool, [level.fact for level in levels], plan.description.prefix_tokens)
        return levels

    async def _compute(
        self,
        prepared: Prepared,
        batch: Batch,
        levels: Sequence[LevelShape],
        model: LoadedModel,
        neck: LoadedNeck | None,
    ) -> Done:
        query, plan = prepared.query, prepared.plan
        work = Work(
            model=model,
            neck=None if neck is None else neck.neck,
            names=tuple(level.fact.name for level in levels),
            layouts=tuple(level.fact.layout for level in levels),
            levels=plan.levels,
            prefix_tokens=plan.description.prefix_tokens,
            images=batch.images,
            precision=query.precision,
            pool=query.pool,
            normalize=query.normalize,
            dtype=query.dtype,
            valid=batch.valid,
        )
        group = (model.id, batch.images.shape[1:], query.precision)
        job: WorkJob = WorkJob(group, len(batch.infos), work, prepared.deadline)
        self.batcher.submit(job)
        try:
            return await asyncio.wrap_future(job.future)
        except SIZE_ERRORS:
            height, width = batch.images.shape[2:]
            # Says so if it is the size that the architecture does not take; any other failure is ours.
            await self.planning(self.planner.levels_at, plan, (height, width), _size_pointer(query))
            raise

    # --- models ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _leased(
        self, prepared: Prepared
    ) -> AsyncIterator[tuple[Entry[LoadedNetwork], LoadedModel, LoadedNeck | None]]:
        """The networks of a query, loaded if need be; the deadline ends the wait, not the load."""
        plan, weights = prepared.plan, prepared.weights
        build = partial(build_model, plan, weights, self.device)
        self._note_load(prepared.model_id, plan.type, weights)
        async with self._lease(prepared.model_id, plan.description.bytes, build, prepared.deadline) as entry:
            model = entry.model
            assert isinstance(model, LoadedModel)
            model.refuse_unfilled(plan.levels, plan.weights.pointer if plan.weights else "#/backbone")
            async with self._leased_neck(prepared) as neck:
                yield entry, model, neck

    @asynccontextmanager
    async def _leased_neck(self, prepared: Prepared) -> AsyncIterator[LoadedNeck | None]:
        """The neck of a query. One without weights is made anew: it costs nothing and is in no list."""
        plan, weights = prepared.plan.neck, prepared.neck_weights
        if plan is None:
            yield None
        elif not plan.description.parameters:
            yield build_plain_neck(plan, self.device)
        else:
            build = partial(build_neck, plan, weights, self.device)
            key = network_id(plan.key, weights)
            self._note_load(key, plan.type, weights)
            async with self._lease(key, plan.description.bytes, build, prepared.deadline) as entry:
                assert isinstance(entry.model, LoadedNeck)
                yield entry.model

    @asynccontextmanager
    async def _lease(
        self, key: str, needed_bytes: int, build: Callable[[], LoadedNetwork], deadline: float
    ) -> AsyncIterator[Entry[LoadedNetwork]]:
        loading = ModelLoading("the model is still loading; ask again", retry_after_s=5)
        lease = self.cache.lease(key, needed_bytes, partial(self._counted, build))
        async with until(deadline, loading):
            entry = await lease.__aenter__()
        try:
            yield entry
        finally:
            await lease.__aexit__(None, None, None)

    def _note_load(self, key: str, type_name: str, weights: Weights | None) -> None:
        """Remember what a load is of, for as long as it is under way."""
        under_way = set(self.cache.loading)
        self._loads = {known: fact for known, fact in self._loads.items() if known in under_way}
        self._loads.setdefault(key, loading_entry(key, type_name, weights))

    def _counted(self, build: Callable[[], LoadedNetwork]) -> tuple[LoadedNetwork, int]:
        """A load, counted by how it went."""
        outcome = "failed"
        try:
            network = build()
            outcome = "loaded"
        finally:
            self.metrics.loads.labels(outcome).inc()
        return network, network.bytes

    async def load(
        self, backbone: Any, neck: Any = None, preprocess: Any = None
    ) -> tuple[dict[str, Any], bool]:
        """Load what a config builds and run it once; its entry of `GET /models`, and whether it is new."""
        prepared = await self.prepare(FeatureQuery(backbone, neck=neck, preprocess=preprocess))
        fresh = all(entry.key != prepared.model_id for entry in self.cache)
        async with self._leased(prepared) as (entry, model, neck):
            if fresh:
                await self._run_once(prepared, model, neck)
            return model_entry(entry), fresh

    async def _run_once(self, prepared: Prepared, model: LoadedModel, neck: LoadedNeck | None) -> None:
        """Compute one blank image, so that the first real one does not pay for what is set up lazily."""
        size = prepared.spec.size or prepared.plan.input_size
        batch = Batch.blank(prepared.plan.description.in_channels, size)
        levels = await self._levels(prepared, batch)
        await self._compute(prepared, batch, levels, model, neck)

    def model_list(self) -> dict[str, Any]:
        """What is in memory and what is on its way there, and the budget."""
        entries = sorted(self.cache, key=lambda entry: entry.last_used, reverse=True)
        return {
            "models": [model_entry(entry) for entry in entries],
            "loading": [
                *self.checkpoints.describe(),
                *(self._loads[key] for key in self.cache.loading if key in self._loads),
            ],
            "budget": {
                "bytes": self.cache.budget_bytes,
                "used": self.cache.used_bytes,
                "device": str(self.device),
            },
        }

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the warm list."""
        if self.settings.warm and self._warming is None:
            self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        for name in self.settings.warm:
            self._not_warm = f"loading {name}"
            try:
                await self.load(name)
            except ServiceError as error:
                self._not_warm = f"{name} of the warm list cannot be loaded"
                log.error("%s: %s", self._not_warm, error.detail)
                return
            log.info("%s is loaded", name)
        self._not_warm = None

    def not_ready(self) -> str | None:
        """Why the service should not be sent requests; None when it should."""
        return "draining" if self.draining else self._not_warm

    def fault(self) -> str | None:
        """Why the process should be restarted; None while it works."""
        if not self.batcher.alive:
            return "the device worker ended"
        busy_s = self.batcher.busy_seconds()
        return f"the device worker has been busy for {busy_s:.0f} s" if busy_s > STUCK_AFTER_S else None

    async def stop(self) -> None:
        """Answer everyone who waits, and end the threads."""
        self.draining = True
        if self._warming is not None:
            self._warming.cancel()
        self.checkpoints.stop()
        await asyncio.to_thread(self.batcher.stop)
        for executor in (self._codecs, self._plans, self._fetches, self._loader):
            executor.shutdown(wait=False, cancel_futures=True)

    # --- numbers --------------------------------------------------------------------------------

    def _observe_batch(self, images: int, seconds: float) -> None:
        del seconds  # each request's own forward time is observed with its stages
        self.metrics.batch_images.observe(images)

    def _observe_stages(self, seconds: dict[str, float]) -> None:
        for stage, spent in seconds.items():
            self.metrics.stage_seconds.labels(stage).observe(spent)

    def metrics_text(self) -> bytes:
        """Prometheus text; gauges are read when asked for."""
        self.metrics.models.set(len(list(self.cache)))
        self.metrics.model_bytes.set(self.cache.used_bytes)
        self.metrics.budget_bytes.set(self.cache.budget_bytes)
        self.metrics.evictions.set(self.cache.evictions)
        self.metrics.queue_images.set(self.batcher.waiting_images)
        self.metrics.downloads.set(len(self.store.transfers))
        self.metrics.fetched_bytes.set(self.store.fetched_bytes)
        return self.metrics.text()


def _size_pointer(query: FeatureQuery) -> str:
    """Where a request says how large its images are."""
    return SIZE_POINTER if query.tensor is None else "#/tensor"


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last lap went into this stage."""
        now = time.perf_counter()
        self.seconds[stage], self._since = now - self._since, now

    def note(self, stage: str, seconds: float) -> None:
        """A stage measured elsewhere."""
        self.seconds[stage] = seconds


def _checkpoint_store(settings: Settings) -> CheckpointStore:
    return CheckpointStore(
        settings.checkpoint_dir,
        hosts=frozenset(settings.checkpoint_hosts),
        mirrors=settings.mirrors,
        hub_endpoint=settings.hub_endpoint,
        max_bytes=settings.max_checkpoint_bytes,
        connect_timeout_s=CONNECT_TIMEOUT_S,
        download_timeout_s=settings.download_timeout,
    )


def _name(backbone: Any) -> str | None:
    """The name of a named config; None for one of the request's own."""
    return backbone if isinstance(backbone, str) else None


def _neck_ref(plan: Plan) -> WeightsRef | None:
    """Where a neck's weights are: where its config says, else perhaps beside the backbone's in one checkpoint."""
    if plan.neck is None or not plan.neck.description.parameters:
        return None
    own = plan.neck.config.weights()
    if own is not None or plan.weights is None:
        return own
    return WeightsRef(plan.weights.name, NECK_PREFIX, plan.weights.pointer)
