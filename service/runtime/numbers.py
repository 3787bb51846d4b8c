"""The engine's state as numbers, read when `GET /metrics` asks for them."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from service.runtime.device import memory_bytes
from service.runtime.engine import Engine
from service.runtime.status import versions


class EngineNumbers:
    """Queue, models, downloads, device memory and versions, as they are when called."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._versions = tuple(_versions(engine))  # read from the libraries' files, which takes milliseconds

    def __call__(self) -> Iterator[Metric]:
        yield from _queue(self._engine)
        yield from _memory(self._engine)
        yield from _models(self._engine)
        yield from _downloads(self._engine)
        yield _device(self._engine)
        yield from self._versions


def _queue(engine: Engine) -> Iterator[Metric]:
    waiting = engine.batcher.waiting()
    yield GaugeMetricFamily("backbone_queue_images", "Images that wait for the device.", waiting.images)
    yield GaugeMetricFamily(
        "backbone_queue_capacity_images", "Images that may wait.", engine.settings.queue_size
    )
    # A number for each model would be a label that clients make up; these tell one hot model from many.
    yield GaugeMetricFamily("backbone_queue_models", "Models that images wait for.", waiting.models)
    yield GaugeMetricFamily("backbone_queue_clients", "Clients whose images wait.", waiting.clients)
    yield GaugeMetricFamily(
        "backbone_queue_longest_images",
        "Images that wait for the model that most wait for.",
        waiting.longest,
    )
    yield GaugeMetricFamily(
        "backbone_queue_oldest_seconds",
        "Time that the first in the queue has waited.",
        waiting.oldest_s,
    )
    yield GaugeMetricFamily(
        "backbone_device_busy_seconds",
        "Time that the batch which runs longest has run.",
        engine.batcher.busy_seconds(),
    )


def _memory(engine: Engine) -> Iterator[Metric]:
    shares = engine.memory.shares
    yield GaugeMetricFamily(
        "backbone_work_memory_bytes", "Bytes that requests in flight have taken.", shares.used
    )
    yield GaugeMetricFamily("backbone_work_memory_limit_bytes", "Bytes that they may take.", shares.capacity)
    yield GaugeMetricFamily(
        "backbone_work_memory_waiting_requests", "Requests that wait for memory.", shares.waiting
    )


def _models(engine: Engine) -> Iterator[Metric]:
    cache = engine.networks.cache
    yield GaugeMetricFamily("backbone_models", "Networks in memory.", len(list(cache)))
    yield GaugeMetricFamily("backbone_models_loading", "Networks that are being loaded.", len(cache.loading))
    yield GaugeMetricFamily(
        "backbone_model_bytes", "Bytes of networks in memory and of loads.", cache.used_bytes
    )
    yield GaugeMetricFamily(
        "backbone_model_budget_bytes", "Bytes that networks may take.", cache.budget_bytes
    )
    yield CounterMetricFamily("backbone_model_evictions", "Networks evicted to make room.", cache.evictions)


def _downloads(engine: Engine) -> Iterator[Metric]:
    store = engine.store
    yield GaugeMetricFamily(
        "backbone_checkpoint_downloads", "Checkpoints being downloaded.", len(store.transfers)
    )
    yield CounterMetricFamily(
        "backbone_checkpoint_fetched_bytes", "Bytes of checkpoints downloaded.", store.fetched_bytes
    )


def _device(engine: Engine) -> Metric:
    memory = GaugeMetricFamily(
        "backbone_device_memory_bytes", "Memory of the device that models run on.", labels=["kind"]
    )
    for kind, held_bytes in memory_bytes(engine.device).items():
        memory.add_metric([kind], held_bytes)
    return memory


def _versions(engine: Engine) -> Iterator[Metric]:
    facts = versions(engine.device)
    device = {"device": facts.pop("device"), "device_name": facts.pop("device_name")}
    yield InfoMetricFamily("backbone_build", "Versions, and the build of the image.", facts)
    yield InfoMetricFamily(
        "backbone_engine", "What runs the models.", {"engine": engine.settings.engine, **device}
    )
