"""The engine: from a request for features to arrays, over the planner, the model cache and the device worker."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from service.backbones.catalogue import backbone_registry
from service.checkpoints.resolve import CheckpointStore
from service.config.files import ConfigCatalogue, named_in_errors
from service.config.spec import WeightsRef
from service.context import current_recorder
from service.errors import InvalidConfig, QueueFull, ServiceError
from service.metrics import FORMATS, Metrics
from service.necks.catalogue import neck_registry
from service.protocol.reply import FeatureReply, FloatArray, ImageInfo, ModelInfo, Timings
from service.runtime.admission import Admission, WeighReply, size_pointer
from service.runtime.batcher import Batcher
from service.runtime.device import available_cores, compute_in_float32, pick_device
from service.runtime.device_images import Upload, Uploads
from service.runtime.engines.openvino_engine import Threads
from service.runtime.fair_threads import FairThreads
from service.runtime.fetches import Fetches
from service.runtime.hub_models import is_hub_model, with_architecture
from service.runtime.intake import TENSOR, Batch, ByteBatch, Heads, Intake, Limits
from service.runtime.memory import WorkMemory
from service.runtime.model import NECK_PREFIX, LoadedModel, LoadedNeck, Weights, network_id
from service.runtime.networks import Networks
from service.runtime.pixels import count_pixels
from service.runtime.plan import SIZE_ERRORS, LevelShape, Plan, Planner
from service.runtime.precision import ALL, native_precisions, refuse_emulated
from service.runtime.promotion import EngineFailed
from service.runtime.query import FeatureQuery, Prepared, fingerprint
from service.runtime.rates import retry_after
from service.runtime.report import model_info, reply_levels
from service.runtime.shares import Share
from service.runtime.speed import Speed
from service.runtime.threads import Deadline, on_thread, until
from service.runtime.work import DeviceRunner, Done, Work, WorkJob
from service.settings import Settings

if TYPE_CHECKING:
    from service.images.hosts import ImageUrl
    from service.images.remote import RemoteImages

P = ParamSpec("P")
T = TypeVar("T")
CONNECT_TIMEOUT_S = 3.0
# How long a batch that found too little memory waits for idle models to be evicted.
EVICTION_TIMEOUT_S = 10.0
# Bytes of images whose digest takes less than handing them to another thread.
MAX_DIGESTED_AT_ONCE = 200_000
# Bytes of pixels whose copy to pinned memory takes less than handing them to another thread.
MAX_UPLOADED_AT_ONCE = 1_000_000
log = logging.getLogger("service.engine")


class Engine:
    """Everything behind the API. Call `start` and `stop` inside a running event loop.

    Args:
        takes_bytes: whether images go to the device as bytes and are normalised there; None where that is faster.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, takes_bytes: bool | None = None) -> None:
        self.settings = settings
        self.metrics = metrics
        self._stages = {stage.name: metrics.stage_seconds.labels(stage.name) for stage in fields(Timings)}
        self._images = {form: metrics.images.labels(form) for form in FORMATS}
        self.device = pick_device(settings.device)
        if self.device.type == "cuda":
            compute_in_float32()
        self.precisions = ALL if settings.emulate_precision else native_precisions(self.device)
        self.planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(settings.config_dir))
        self.store = _checkpoint_store(settings)
        self._codecs = FairThreads(settings.decode_threads or available_cores(), "codec")
        self._plans = FairThreads(2, "planner")
        self._fetches = ThreadPoolExecutor(4, "fetch")
        self.checkpoints = Fetches(self.store, self._fetches)
        self._limits = Limits(settings.max_pixels, settings.max_images, settings.max_body_bytes // 4)
        self._remote_images = _remote_images(settings, metrics)
        self._takes_bytes = self.device.type == "cuda" if takes_bytes is None else takes_bytes
        self._uploads = Uploads(self.device)
        self.networks = Networks(settings, self.device, metrics)
        cores = available_cores()
        lanes = 1 if self.networks.promotions is None else Threads.of(cores).streams
        self.memory = WorkMemory(settings.work_memory, self.device, lanes, self.networks.evict_idle)
        self.speed = Speed.of(self.device, cores, settings.request_timeout)
        self.batcher: Batcher[Work, Done] = Batcher(
            DeviceRunner(settings.max_batch, cores, self._make_room),
            lanes=lanes,
            max_batch=settings.max_batch,
            queue_size=settings.queue_size,
            max_wait_s=settings.max_wait,
            observe=self._observe_batch,
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._warming: asyncio.Task[None] | None = None
        self._not_warm: str | None = "models are being loaded" if settings.warm else None

    # --- features -------------------------------------------------------------------------------

    async def prepare(
        self,
        query: FeatureQuery,
        deadline: Deadline,
        extra: str = "",
        on_new: Callable[[], None] = lambda: None,
    ) -> Prepared:
        """Resolve a query: config, preprocessing, weights, images to fetch. Nothing is decoded, loaded or computed.

        Args:
            extra: whatever else decides the bytes of the reply; it goes into the fingerprint.
            on_new: called before a config is resolved for the first time, and where its model has to be loaded;
                what it raises ends the request.
        """
        refuse_emulated(query.precision, self.precisions, self.device)
        urls = self._image_urls(query)
        plan = self._known(query)
        if plan is None:
            async with until(deadline):
                named = query.backbone, query.neck, query.preprocess
                plan = await self.plan(query.client, *named, on_new=on_new)
        with named_in_errors(_name(query.backbone)):
            spec = plan.spec
        weights = await self._found(plan.weights, plan.type, deadline)
        neck_type = plan.type if plan.neck is None else plan.neck.type
        neck_weights = await self._found(_neck_ref(plan), neck_type, deadline)
        identity = network_id(plan.key, weights)
        if not self.networks.holds(identity):
            on_new()
        fetch_ms = 0.0
        if urls:
            query, fetch_ms = await self._with_images(query, urls, deadline)
        parts = (query, plan, identity, neck_weights, extra)
        is_small = query.bytes <= MAX_DIGESTED_AT_ONCE
        codecs = self._codecs.of(query.client)
        digest = fingerprint(*parts) if is_small else await on_thread(codecs, fingerprint, *parts)
        return Prepared(query, plan, spec, weights, neck_weights, identity, digest, deadline, fetch_ms)

    def _image_urls(self, query: FeatureQuery) -> Mapping[int, ImageUrl]:
        """The URLs of the images, by their form alone.

        Raises:
            InvalidConfig: one that is not fetched here.
        """
        if not query.urls:
            return {}
        if self._remote_images is None:
            detail = "fetching image URLs is off on this server; send the image as base64"
            raise InvalidConfig(f"#/images/{min(query.urls)}/url", detail)
        return self._remote_images.read(query.urls)

    async def _with_images(
        self, query: FeatureQuery, urls: Mapping[int, ImageUrl], deadline: Deadline
    ) -> tuple[FeatureQuery, float]:
        """The query with the images behind its URLs, and the milliseconds that they took.

        They come last: a config that cannot be served fetches none.
        """
        assert self._remote_images is not None
        clock = _Clock()
        async with until(deadline):
            fetched = await self._remote_images.fetch(urls, self.settings.max_body_bytes - query.bytes)
        clock.lap("fetch")
        images = tuple(fetched.get(index, image) for index, image in enumerate(query.images))
        return replace(query, images=images), clock.seconds["fetch"] * 1000

    def _known(self, query: FeatureQuery) -> Plan | None:
        """The plan of a config that was resolved before and depends on no file."""
        if isinstance(query.backbone, str) or is_hub_model(query.backbone):
            return None
        return self.planner.known(query.backbone, query.neck, query.preprocess)

    async def plan(
        self,
        client: str,
        backbone: Any,
        neck: Any = None,
        preprocess: Any = None,
        *,
        on_new: Callable[[], None] = lambda: None,
    ) -> Plan:
        """A config, or the name of one, resolved when it is this client's turn.

        Args:
            on_new: called if it was not resolved before.

        Raises:
            UnknownBackbone, UnknownConfig, InvalidConfig: what is wrong and where.
        """
        with named_in_errors(_name(backbone)):
            if isinstance(backbone, str):
                named = on_thread(self._codecs.of(client), self.planner.named, backbone, neck, preprocess)
                backbone, neck, preprocess = await named
            if is_hub_model(backbone):
                backbone = await on_thread(self._fetches, with_architecture, backbone, self.store)
            # A config that is known does not wait behind one that must be built on the meta device.
            known = self.planner.known(backbone, neck, preprocess)
            if known is not None:
                return known
            on_new()
            return await self.planning(client, self.planner.plan, backbone, neck, preprocess)

    async def planning(
        self, client: str, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
    ) -> T:
        """Run something that may build an architecture on the meta device, when it is this client's turn."""
        return await on_thread(self._plans.of(client), function, *arguments, **keywords)

    def refuse_long_wait(self, prepared: Prepared) -> None:
        """Refuse who would wait too long for a thread that decodes, or for the device; nothing is decoded yet.

        Raises:
            QueueFull: it would wait for too long.
        """
        wait_s = self._codecs.expected_wait_s(prepared.query.client)
        limit_s = min(self.settings.max_wait, prepared.deadline.left_s)
        if wait_s > limit_s:
            detail = f"images wait for about {wait_s:.1f} s; this request may wait for {limit_s:.1f} s"
            raise QueueFull(detail, retry_after_s=retry_after(wait_s, self.settings.request_timeout))
        self.batcher.refuse_long_wait(prepared.model_id, prepared.deadline.at, prepared.query.client)

    async def _found(self, ref: WeightsRef | None, type_name: str, deadline: Deadline) -> Weights | None:
        """The checkpoint that was asked for. The deadline ends the wait, not a download that goes on."""
        if ref is None:
            return None
        async with until(deadline, partial(self.checkpoints.too_late, ref)):
            return Weights(ref, await self.checkpoints.find(ref, type_name))

    async def extract(self, prepared: Prepared, weigh_reply: WeighReply, share: Share) -> FeatureReply:
        """Decode, run, and describe the levels of a prepared query.

        Args:
            weigh_reply: given the shapes and names of the levels before anything is decoded or computed; the bytes of
                the reply, or raises if they make none that may be sent.
            share: what the request has of the memory. It is the caller's, and holds what the reply takes afterwards.

        Raises:
            QueueFull: it would wait for too long; nothing was decoded.
        """
        self.refuse_long_wait(prepared)
        clock = _Clock()
        admission = self._admission(prepared, weigh_reply, share)
        async with until(prepared.deadline, lambda: admission.late() or prepared.deadline.passed()):
            batch = await self._batch(prepared, admission)
            levels = await admission.levels_for(len(batch.infos), _size(batch))
        clock.lap("decode")
        try:
            done, described = await self._answered(prepared, batch, admission, levels, clock)
        except EngineFailed:  # it is not asked again, and torch is
            done, described = await self._answered(prepared, batch, admission, levels, clock)
        share.keep(admission.need.reply_bytes)
        self._observe_stages(clock.seconds)
        self._observe_images(batch.infos)
        return FeatureReply(
            model=described,
            images=batch.infos,
            levels=reply_levels(levels, done.arrays, prepared.query.pool),
            timings=Timings(**{stage: seconds * 1000 for stage, seconds in clock.seconds.items()}),
            preprocess=None if prepared.query.tensor is not None else prepared.spec.as_json(),
        )

    def _admission(self, prepared: Prepared, weigh_reply: WeighReply, share: Share) -> Admission:
        threads = self._plans.of(prepared.query.client)
        return Admission(prepared, share, self.memory, self.speed, self.planner, threads, weigh_reply)

    async def _answered(
        self,
        prepared: Prepared,
        batch: Batch | ByteBatch,
        admission: Admission,
        levels: tuple[LevelShape, ...],
        clock: _Clock,
    ) -> tuple[Done, ModelInfo]:
        """The levels, and the model that gave them.

        Raises:
            EngineFailed: a converted network failed on this input, and answers no more.
        """
        async with self.networks.leased(prepared, _size(batch)) as (_, model, neck):
            clock.lap("load")
            async with until(prepared.deadline):
                done = await self._compute(prepared, batch, admission, levels, model, neck)
            clock.note("queue", done.queue_s, ended_s_ago=done.forward_s)
            clock.note("forward", done.forward_s)
            return done, model_info(prepared, model, neck)

    async def pixels(self, prepared: Prepared) -> int:
        """What a query has to be computed, as its headers say; nothing is decoded.

        Raises:
            UndecodableImage, UnsupportedMedia, TooLarge, MalformedBody: what is wrong with it.
        """
        query, limit = prepared.query, self.settings.max_pixels
        if query.bytes <= MAX_DIGESTED_AT_ONCE:
            return count_pixels(query, prepared.spec, limit)
        return await on_thread(self._codecs.of(query.client), count_pixels, query, prepared.spec, limit)

    async def encode(self, client: str, encode: Callable[[], T]) -> T:
        """Run an encoder off the event loop, when it is this client's turn."""
        return await on_thread(self._codecs.of(client), encode)

    async def _batch(self, prepared: Prepared, admission: Admission) -> Batch | ByteBatch:
        query, channels = prepared.query, prepared.plan.description.in_channels
        intake = Intake(self._codecs.of(query.client), self._limits)
        if query.tensor is not None:
            return await intake.tensor(query.tensor, channels, admission)
        if self._takes_bytes:
            return await intake.byte_images(query.images, prepared.spec, channels, admission)
        return await intake.images(query.images, prepared.spec, channels, admission)

    async def _on_the_way(self, client: str, batch: Batch | ByteBatch) -> FloatArray | Upload:
        """What the device worker takes; bytes are sent ahead, so that they are there when their turn comes."""
        if isinstance(batch, Batch):
            return batch.images
        if batch.images.nbytes <= MAX_UPLOADED_AT_ONCE:
            return self._uploads.begin(batch)
        return await on_thread(self._codecs.of(client), self._uploads.begin, batch)

    async def _compute(
        self,
        prepared: Prepared,
        batch: Batch | ByteBatch,
        admission: Admission,
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
            images=await self._on_the_way(query.client, batch),
            precision=query.precision,
            pool=query.pool,
            normalize=query.normalize,
            dtype=query.dtype,
            valid=batch.valid,
            at_once=admission.need.at_once,
            recorder=current_recorder(),
        )
        alike = tuple(sorted(set(plan.nodes))) if model.engine.by_nodes else ()
        group = (model.id, model.engine.name, batch.images.shape[1:], query.precision, alike)
        concurrent = model.engine.concurrent and neck is None
        job: WorkJob = WorkJob(
            group, len(batch.infos), work, prepared.deadline.at, model.id, concurrent, query.client
        )
        try:
            answer = self.batcher.submit_async(job)
            admission.share.until(job.future)
            return await answer
        except SIZE_ERRORS as error:
            height, width = batch.images.shape[2:]
            # Says so if it is the size that the architecture does not take; any other failure is ours.
            pointer = size_pointer(query)
            await self.planning(query.client, self.planner.levels_at, plan, (height, width), pointer)
            if await self.networks.distrust(model, (height, width)):
                raise EngineFailed from error
            raise

    # --- models ---------------------------------------------------------------------------------

    async def load(
        self,
        backbone: Any,
        neck: Any,
        preprocess: Any,
        deadline: Deadline,
        on_new: Callable[[], None] = lambda: None,
    ) -> tuple[dict[str, Any], bool]:
        """Load what a config builds and run it once; its entry of `GET /models`, and whether it is new."""
        query = FeatureQuery(backbone, neck=neck, preprocess=preprocess)
        prepared = await self.prepare(query, deadline, on_new=on_new)
        fresh = not self.networks.holds(prepared.model_id)
        batch = Batch.blank(
            prepared.plan.description.in_channels, prepared.spec.size or prepared.plan.input_size
        )
        async with self.networks.leased(prepared, _size(batch)) as (entry, model, neck):
            if fresh:  # so that the first real image does not pay for what is set up lazily
                async with until(deadline):
                    await self._warm_up(prepared, batch, model, neck)
            return self.networks.describe(entry), fresh

    async def _warm_up(
        self, prepared: Prepared, batch: Batch, model: LoadedModel, neck: LoadedNeck | None
    ) -> None:
        share = self.memory.share(prepared.query.client)
        try:
            admission = self._admission(prepared, lambda _shapes, _names: 0, share)
            await admission.in_turn(Heads(1, _size(batch), 0, batch.images.nbytes))
            await self._compute(prepared, batch, admission, admission.levels, model, neck)
        finally:
            share.let_go()

    def model_list(self) -> dict[str, Any]:
        """What is in memory and what is on its way there, and the budget."""
        return {
            "models": self.networks.describe_all(),
            "loading": [*self.checkpoints.describe(), *self.networks.loading()],
            "budget": {
                "bytes": self.networks.cache.budget_bytes,
                "used": self.networks.cache.used_bytes,
                "device": str(self.device),
            },
        }

    # --- life -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to load the warm list."""
        self._loop = asyncio.get_running_loop()
        if self.settings.warm and self._warming is None:
            self._warming = asyncio.create_task(self._warm())

    async def _warm(self) -> None:
        for name in self.settings.warm:
            self._not_warm = f"loading {name}"
            try:
                await self.load(name, None, None, Deadline.after(math.inf))
            except ServiceError as error:
                self._not_warm = f"{name} of the warm list cannot be loaded"
                log.error("%s: %s", self._not_warm, error.detail)
                return
            log.info("%s is loaded", name)
        self._not_warm = None

    def _make_room(self) -> None:
        """Have idle models evicted; called on the thread of a lane that found too little memory."""
        if self._loop is None:
            return
        evicted = threading.Event()

        def evict() -> None:
            self.networks.evict_idle()
            evicted.set()

        with suppress(RuntimeError):  # the event loop has ended, and what it held with it
            self._loop.call_soon_threadsafe(evict)
            evicted.wait(EVICTION_TIMEOUT_S)

    def not_ready(self) -> str | None:
        """Why the service should not be sent requests; None when it should."""
        return self._not_warm

    def fault(self) -> str | None:
        """Why the process should be restarted; None while it works."""
        if not self.batcher.alive:
            return "the device worker ended"
        stuck = {"device worker": self.batcher.busy_seconds(), "decoder": self._codecs.stuck_seconds()}
        who, busy_s = max(stuck.items(), key=lambda item: item[1])
        return f"the {who} has been busy for {busy_s:.0f} s" if busy_s > self.settings.stuck_after else None

    async def stop(self) -> None:
        """Answer everyone who waits, and end the threads."""
        if self._warming is not None:
            self._warming.cancel()
        self.checkpoints.stop()
        if self._remote_images is not None:
            self._remote_images.stop()
        await self.networks.stop()
        await asyncio.to_thread(self.batcher.stop)
        for threads in (self._plans, self._codecs):
            threads.shutdown(cancel_futures=True)
        self._fetches.shutdown(wait=False, cancel_futures=True)

    # --- numbers --------------------------------------------------------------------------------

    def _observe_batch(self, jobs: Sequence[WorkJob], seconds: float) -> None:
        images = sum(job.images for job in jobs)
        self.metrics.batch_images.observe(images)
        recorders = [job.payload.recorder for job in jobs if job.payload.recorder is not None]
        if recorders:
            recorders[0].batch(recorders, images, seconds)

    def _observe_images(self, infos: Sequence[ImageInfo]) -> None:
        for info in infos:
            self._images[info.format].inc()
            if info.format != TENSOR:
                self.metrics.image_pixels.observe(info.width * info.height)

    def _observe_stages(self, seconds: Mapping[str, float]) -> None:
        for stage, spent in seconds.items():
            self._stages[stage].observe(spent)

    def observe_encode(self, seconds: float) -> None:
        """Count what writing a reply took, which is over now."""
        self._stages["encode"].observe(seconds)
        recorder = current_recorder()
        if recorder is not None:
            recorder.stage("encode", seconds)


def _size(batch: Batch | ByteBatch) -> tuple[int, int]:
    """[height, width] of what the network sees."""
    height, width = batch.images.shape[2:]
    return height, width


class _Clock:
    """Seconds by stage, told to who records the request."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._recorder = current_recorder()
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """What passed since the last lap went into this stage."""
        now = time.perf_counter()
        self.note(stage, now - self._since)
        self._since = now

    def note(self, stage: str, seconds: float, *, ended_s_ago: float = 0.0) -> None:
        """A stage measured elsewhere."""
        self.seconds[stage] = seconds
        if self._recorder is not None:
            self._recorder.stage(stage, seconds, ended_s_ago)


def _remote_images(settings: Settings, metrics: Metrics) -> RemoteImages | None:
    if not settings.image_hosts:
        return None
    from service.images.remote import RemoteImages  # with HTTPX, which most services have no use for

    return RemoteImages.of(settings, metrics)


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
