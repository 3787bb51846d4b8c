"""Counters of one running service, in Prometheus' form. Labels never hold a client's text."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One registry an app, so that two apps in one process do not share numbers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "backbone_requests", "Requests by route and status.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "backbone_request_seconds",
            "Time a request took.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "backbone_in_flight_requests", "Requests being answered.", registry=self.registry
        )
        self.connections = Gauge("backbone_connections", "Open connections.", registry=self.registry)
        self.dropped_connections = Counter(
            "backbone_dropped_connections",
            "Connections closed without a reply or in the middle of one, by reason: no request, slow reader, "
            "unread body, too many connections.",
            ["reason"],
            registry=self.registry,
        )
        self.body_bytes = Gauge(
            "backbone_body_bytes", "Bytes of request bodies in memory.", registry=self.registry
        )
        self.stage_seconds = Histogram(
            "backbone_stage_seconds",
            "Time of each stage of /features: load, decode, queue, forward, encode.",
            ["stage"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batch_images = Histogram(
            "backbone_batch_images", "Images in one forward pass.", buckets=SIZES, registry=self.registry
        )
        self.queue_images = Gauge("backbone_queue_images", "Images that wait.", registry=self.registry)
        self.work_bytes = Gauge(
            "backbone_work_memory_bytes", "Bytes that requests in flight have taken.", registry=self.registry
        )
        self.work_limit_bytes = Gauge(
            "backbone_work_memory_limit_bytes", "Bytes that they may take.", registry=self.registry
        )
        self.work_waiting = Gauge(
            "backbone_work_memory_waiting_requests", "Requests that wait for memory.", registry=self.registry
        )
        self.models = Gauge("backbone_models", "Models in memory.", registry=self.registry)
        self.model_bytes = Gauge("backbone_model_bytes", "Bytes of the models.", registry=self.registry)
        self.budget_bytes = Gauge(
            "backbone_model_budget_bytes", "Bytes models may take.", registry=self.registry
        )
        self.evictions = Gauge("backbone_model_evictions", "Models evicted.", registry=self.registry)
        self.downloads = Gauge(
            "backbone_checkpoint_downloads", "Checkpoints being downloaded.", registry=self.registry
        )
        self.fetched_bytes = Gauge(
            "backbone_checkpoint_fetched_bytes", "Bytes of checkpoints downloaded.", registry=self.registry
        )
        self.image_fetches = Counter(
            "backbone_image_fetches",
            "Fetches of image URLs by what became of them: fetched, denied (its address is not allowed), unresolved, "
            "unreachable, redirected, status, compressed, large, slow, broken, abandoned.",
            ["outcome"],
            registry=self.registry,
        )
        self.image_fetches_in_flight = Gauge(
            "backbone_image_fetches_in_flight", "Image URLs being fetched.", registry=self.registry
        )
        self.image_fetched_bytes = Counter(
            "backbone_image_fetched_bytes", "Bytes of images fetched from URLs.", registry=self.registry
        )
        self.image_fetch_seconds = Histogram(
            "backbone_image_fetch_seconds",
            "Time that fetching one image took.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.loads = Counter("backbone_model_loads", "Loads by outcome.", ["outcome"], registry=self.registry)
        self.access_refused = Counter(
            "backbone_access_refused",
            "Requests refused for who asked: no_key, several_keys, unknown_key, no_operator, or over the quota of "
            "requests, megapixels, new_models.",
            ["reason"],
            registry=self.registry,
        )
        self.promotions = Counter(
            "backbone_model_promotions",
            "Models that went from torch to a faster engine, by outcome: promoted, refused, failed.",
            ["outcome"],
            registry=self.registry,
        )

    def text(self) -> bytes:
        """The Prometheus text format."""
        return generate_latest(self.registry)
