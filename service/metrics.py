"""Numbers of one running service, in Prometheus' form; `docs/metrics.md` lists them.

Labels never hold a client's text: each takes its values from a table here, from the routes, or from the error classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
LOAD_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SIZES = (1, 2, 4, 8, 16, 32, 64)
PIXELS = (
    10_000,
    50_000,
    200_000,
    500_000,
    1_000_000,
    2_000_000,
    5_000_000,
    12_000_000,
    25_000_000,
    40_000_000,
)
BYTES = (1_000, 10_000, 100_000, 1_000_000, 5_000_000, 10_000_000, 25_000_000, 50_000_000, 100_000_000)

OTHER = "other"
UNMATCHED = "unmatched"  # the route of a request that no route took
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "tensor")
MEDIA_TYPES = (
    "application/json",
    "application/problem+json",
    "application/vnd.apache.arrow.stream",
    "application/vnd.safetensors",
    "application/x-npy",
    "application/x-npz",
    "text/html",
    "text/plain",
)
STAGES = ("load", "decode", "queue", "forward", "encode")
LOADS = ("loaded", "failed")
# "denied" is an address that is not allowed, "abandoned" a fetch that nobody waited for any more.
IMAGE_FETCHES = (
    "fetched",
    "denied",
    "unresolved",
    "unreachable",
    "redirected",
    "status",
    "compressed",
    "large",
    "slow",
    "broken",
    "abandoned",
)
# Keys that were missing, sent twice, not known, not an operator's; quotas that were used up.
ACCESS_REFUSALS = (
    "no_key",
    "several_keys",
    "unknown_key",
    "no_operator",
    "requests",
    "megapixels",
    "new_models",
)
DROPS = ("no request", "slow reader", "unread body", "too many connections")
PROMOTIONS = ("promoted", "refused", "failed")


class Metrics:
    """One registry an app, so that two apps in one process do not share numbers."""

    def __init__(self) -> None:
        # Else each counter and histogram has a gauge of when it began, which nobody asks for.
        disable_created_metrics()  # type: ignore[no-untyped-call]  # the library's own typing leaves it out
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._add_requests()
        self._add_work()
        self._add_models()
        self._add_fetches()

    def _add_requests(self) -> None:
        self.requests = self._counter(
            "backbone_requests", "Requests that are over.", labels=["method", "route", "status"]
        )
        self.request_seconds = self._histogram(
            "backbone_request_seconds",
            "Time from a request's headers to the end of its reply.",
            SECONDS,
            labels=["route"],
        )
        self.in_flight = Gauge(
            "backbone_in_flight_requests", "Requests being answered.", registry=self.registry
        )
        self.connections = Gauge("backbone_connections", "Open connections.", registry=self.registry)
        self.dropped_connections = self._counter(
            "backbone_dropped_connections",
            "Connections closed without a reply, or in the middle of one.",
            labels=["reason"],
            values=DROPS,
        )
        self.body_bytes = Gauge(
            "backbone_body_bytes", "Bytes of request bodies in memory.", registry=self.registry
        )
        self.rejected = self._counter(
            "backbone_rejected", "Requests answered with a problem of docs/errors.md.", labels=["reason"]
        )
        self.access_refused = self._counter(
            "backbone_access_refused",
            "Requests refused for who asked.",
            labels=["reason"],
            values=ACCESS_REFUSALS,
        )
        self.reply_bytes = self._histogram(
            "backbone_reply_bytes", "Bytes of the bodies sent.", BYTES, labels=["media_type"]
        )
        self.loop_lag_seconds = Gauge(
            "backbone_event_loop_lag_seconds",
            "Time that the event loop took to come round, as these numbers were asked for.",
            registry=self.registry,
        )

    def _add_work(self) -> None:
        self.stage_seconds = self._histogram(
            "backbone_stage_seconds",
            "Time of each stage of `POST /features`.",
            SECONDS,
            labels=["stage"],
            values=STAGES,
        )
        self.batch_images = self._histogram("backbone_batch_images", "Images in one forward pass.", SIZES)
        self.images = self._counter(
            "backbone_images", "Images and tensors answered for.", labels=["format"], values=FORMATS
        )
        self.image_pixels = self._histogram(
            "backbone_image_pixels", "Pixels of images, before they are resized.", PIXELS
        )

    def _add_models(self) -> None:
        self.hits = self._counter("backbone_model_hits", "Networks asked for that were in memory.")
        self.misses = self._counter("backbone_model_misses", "Networks asked for that were not in memory.")
        self.loads = self._counter(
            "backbone_model_loads", "Loads of networks.", labels=["outcome"], values=LOADS
        )
        self.load_seconds = self._histogram(
            "backbone_model_load_seconds",
            "Time of the loads that went well, once it was their turn.",
            LOAD_SECONDS,
        )
        self.promotions = self._counter(
            "backbone_model_promotions",
            "Models that went from torch to a faster engine, or did not.",
            labels=["outcome"],
            values=PROMOTIONS,
        )

    def _add_fetches(self) -> None:
        self.image_fetches = self._counter(
            "backbone_image_fetches",
            "Fetches of image URLs that are over.",
            labels=["outcome"],
            values=IMAGE_FETCHES,
        )
        self.image_fetches_in_flight = Gauge(
            "backbone_image_fetches_in_flight", "Image URLs being fetched.", registry=self.registry
        )
        self.image_fetched_bytes = self._counter(
            "backbone_image_fetched_bytes", "Bytes of images fetched from URLs."
        )
        self.image_fetch_seconds = self._histogram(
            "backbone_image_fetch_seconds", "Time that fetching one image took.", SECONDS
        )

    def _counter(
        self, name: str, text: str, labels: Iterable[str] = (), values: Iterable[str] = ()
    ) -> Counter:
        """A counter; for a label whose values are known all are shown from the start, so that rates begin at 0."""
        counter = Counter(name, text, tuple(labels), registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _histogram(
        self,
        name: str,
        text: str,
        buckets: Iterable[float],
        labels: Iterable[str] = (),
        values: Iterable[str] = (),
    ) -> Histogram:
        histogram = Histogram(name, text, tuple(labels), registry=self.registry, buckets=tuple(buckets))
        for value in values:
            histogram.labels(value)
        return histogram

    def add(self, read: Callable[[], Iterable[Metric]]) -> None:
        """Numbers that are read when asked for; `read` is called on the event loop."""
        self.registry.register(_AskedFor(read))

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)


class _AskedFor(Collector):
    """What prometheus-client asks for its numbers."""

    def __init__(self, read: Callable[[], Iterable[Metric]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        return self._read()
