"""What `GET /metrics` says of the traffic, and that no client can make it say more."""

from __future__ import annotations

import random
import string
from collections import defaultdict
from collections.abc import Iterator
from http.client import HTTPConnection
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.api.errors import reason_of
from service.api.openapi import problem_classes
from service.metrics import (
    ACCESS_REFUSALS,
    DROPS,
    FORMATS,
    IMAGE_FETCHES,
    LOADS,
    MEDIA_TYPES,
    METHODS,
    OTHER,
    PROMOTIONS,
    STAGES,
    UNMATCHED,
)
from tests.conftest import RunningService, Serve, encoded, multipart
from tests.docs.test_documented import routes

RESNET18 = {"type": "ResNet", "depth": 18}
DOTS = encoded(np.zeros((20, 30, 3), np.uint8))
HOSTILE_REQUESTS = 2_000


def read(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """Every sample: its name and the values of its labels in the order of their names, but for histograms' buckets."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if "le" not in sample.labels
    }


@pytest.fixture
def service(serve: Serve) -> RunningService:
    return serve()


def test_requests_are_counted_by_method_route_and_status(service: RunningService) -> None:
    http = service.http
    http.get("/healthz")
    http.get("/backbones/ResNet")
    http.get("/backbones/NoSuchNet")
    http.get("/no/such/route")
    http.request("PROPFIND", "/no/such/route")
    http.head("/healthz")
    found = read(http)
    counted = {key[1:]: value for key, value in found.items() if key[0] == "backbone_requests_total"}
    assert counted == {
        ("GET", "/healthz", "200"): 1,
        ("GET", "/backbones/{type}", "200"): 1,
        ("GET", "/backbones/{type}", "404"): 1,
        ("GET", UNMATCHED, "404"): 1,
        (OTHER, UNMATCHED, "404"): 1,
        ("HEAD", UNMATCHED, "405"): 1,
    }
    assert found["backbone_request_seconds_count", "/backbones/{type}"] == 2
    assert found["backbone_in_flight_requests",] == 1  # this one


def test_a_request_for_features_is_counted_by_what_it_brought_and_got(service: RunningService) -> None:
    http = service.http
    http.post("/features", **multipart(RESNET18, DOTS))
    http.post("/features", **multipart(RESNET18, tensor=np.zeros((2, 3, 64, 64), np.float32)))
    reply = http.post("/features", **multipart(RESNET18, DOTS), headers={"Accept": "application/x-npz"})
    found = read(http)
    assert found["backbone_images_total", "PNG"] == 2
    assert found["backbone_images_total", "tensor"] == 2
    assert found["backbone_image_pixels_sum",] == 2 * 20 * 30
    assert found["backbone_batch_images_sum",] == 4
    assert {stage: found["backbone_stage_seconds_count", stage] for stage in STAGES} == dict.fromkeys(
        STAGES, 3
    )
    assert found["backbone_reply_bytes_sum", "application/x-npz"] == len(reply.content)
    assert found["backbone_reply_bytes_count", "application/json"] == 2


def test_the_cache_is_counted(service: RunningService) -> None:
    http = service.http
    for _ in range(3):
        http.post("/features", **multipart(RESNET18, DOTS))
    found = read(http)
    assert (found["backbone_model_misses_total",], found["backbone_model_hits_total",]) == (1, 2)
    assert (found["backbone_model_loads_total", "loaded"], found["backbone_model_loads_total", "failed"]) == (
        1,
        0,
    )
    assert found["backbone_model_load_seconds_count",] == 1
    assert found["backbone_models",] == 1
    assert found["backbone_model_bytes",] == http.get("/models").json()["budget"]["used"]
    assert found["backbone_model_budget_bytes",] == 4_000_000_000
    assert found["backbone_model_evictions_total",] == 0
    assert found["backbone_device_memory_bytes", "free"] > 0
    assert found["process_resident_memory_bytes",] > found["backbone_model_bytes",]


def test_refusals_are_counted_by_their_problem(serve: Serve) -> None:
    http = serve(max_body_bytes=20_000, requests_per_minute=5).http
    http.post("/features", **multipart(RESNET18, b"no image"))
    http.post("/features", **multipart({"type": "NoSuchNet"}, DOTS))
    http.post("/features", content=b"x" * 30_000)
    for _ in range(6):
        http.get("/models")
    found = read(http)
    counted = {key[1]: value for key, value in found.items() if key[0] == "backbone_rejected_total" and value}
    assert counted.pop("quota_exceeded") >= 2
    assert counted == {"unsupported_media": 1, "unknown_backbone": 1, "too_large": 1}


def test_versions_and_the_device_are_labels(service: RunningService) -> None:
    version = service.http.get("/version").json()
    families = {
        family.name: family for family in text_string_to_metric_families(service.http.get("/metrics").text)
    }
    build = families["backbone_build_info"].samples[0].labels
    engine = families["backbone_engine_info"].samples[0].labels
    assert build == {name: version[name] for name in build}
    assert engine == {"engine": "torch", "device": "cpu", "device_name": version["device_name"]}


# --- no client can add to it --------------------------------------------------------------------

PLACES = ("/", "/backbones/", "/configs/", "/models/", "/features/", "/features?backbone=", "/docs/assets/")


def hostile_requests() -> Iterator[tuple[str, str, str]]:
    """Method, target and a word of the client's own, wherever a client can put one."""
    rng = random.Random(5)
    methods = [*METHODS, "PROPFIND", "REPORT", "SUBSCRIBE"]
    letters = string.ascii_letters + "\"'{}=,.\\-_~"
    for index in range(HOSTILE_REQUESTS):
        word = "".join(rng.choices(letters, k=rng.randint(1, 30))) + str(index)
        yield rng.choice(methods), rng.choice(PLACES) + quote(word), word


def send_hostile_requests(service: RunningService) -> None:
    connection = HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    for method, target, word in hostile_requests():
        names = ("X-Request-ID", "X-API-Key", "Accept", "Content-Type", "traceparent", "User-Agent")
        connection.request(method, target, word, dict.fromkeys(names, word))
        connection.getresponse().read()
    connection.close()


def test_no_client_can_add_a_label(service: RunningService) -> None:
    send_hostile_requests(service)
    values = defaultdict(set)
    for family in text_string_to_metric_families(service.http.get("/metrics").text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values[label].add(value)
    assert values["method"] == {*METHODS, OTHER}
    assert values["route"] <= {path for _, path in routes()} | {"/docs/assets/{path}", UNMATCHED}
    assert {int(status) // 100 for status in values["status"]} <= {2, 4}
    assert values["reason"] == {reason_of(problem) for problem in problem_classes()} | {
        *ACCESS_REFUSALS,
        *DROPS,
    }
    assert values["media_type"] <= {*MEDIA_TYPES, OTHER}
    assert values["format"] == set(FORMATS)
    assert values["stage"] == set(STAGES)
    assert values["outcome"] == {*LOADS, *PROMOTIONS, *IMAGE_FETCHES}
    assert sum(map(len, values.values())) < 150
