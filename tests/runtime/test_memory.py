"""What the service really takes of the machine's memory, seen from outside."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.conftest import encoded, multipart
from tests.processes import Process, Start, wait_until

MEGABYTE = 2**20
RESNET50_BYTES = 94 * 10**6
VIEWS: list[dict[str, Any]] = [
    {"out_indices": [0, 1, 2, 3]},
    {"out_indices": [2, 0]},
    {"out_indices": [1]},
    {"strides": [8, 16]},
    {"frozen_stages": 0},
    {"frozen_stages": 1},
    {"frozen_stages": 4},
    {"norm_eval": True},
    {"frozen_stages": 2, "norm_eval": True},
]


def ask(process: Process, config: dict[str, Any]) -> None:
    tensor = np.zeros((1, 3, 64, 64), np.float32)
    reply = process.http.post("/features", **multipart(config, tensor=tensor))
    assert reply.status_code == 200, reply.text


def test_ten_views_of_one_model_take_the_memory_of_one(start: Start) -> None:
    process = start()
    ask(process, {"type": "ResNet", "depth": 18})  # what the libraries take is there before the first reading
    before = process.resident_bytes()
    ask(process, {"type": "ResNet", "depth": 50})
    one = process.resident_bytes() - before
    for view in VIEWS:
        ask(process, {"type": "ResNet", "depth": 50, **view})
    ten = process.resident_bytes() - before
    assert one > RESNET50_BYTES / 2
    assert ten <= 1.1 * max(one, RESNET50_BYTES)


def test_an_unloaded_model_gives_its_memory_back(start: Start) -> None:
    process = start()
    ask(process, {"type": "ResNet", "depth": 18})
    before = process.resident_bytes()
    loaded = process.http.post("/models", json={"backbone": {"type": "ResNet", "depth": 152}}).json()
    assert process.resident_bytes() - before > 200 * MEGABYTE
    assert process.http.delete(f"/models/{loaded['id']}").status_code == 200
    # What is known of its architecture stays, and what kernels took for themselves.
    wait_until(lambda: process.resident_bytes() - before < 100 * MEGABYTE)


def test_many_configs_through_a_small_budget_do_not_add_up(start: Start) -> None:
    process = start("--model-budget", "60000000", "--min-residency", "0")
    for width in range(32, 42):
        ask(process, {"type": "ResNet", "depth": 18, "base_channels": width})
    before = process.resident_bytes()
    for width in range(42, 72):
        ask(process, {"type": "ResNet", "depth": 18, "base_channels": width})
    assert process.resident_bytes() - before < 60 * MEGABYTE


def test_a_pass_that_finds_no_memory_fails_alone_after_idle_models_made_room(start: Start) -> None:
    process = start("--work-memory", "16000000000", "--max-pixels", "40000000")
    ask(process, {"type": "ResNet", "depth": 18})
    ask(process, {"type": "ResNet", "depth": 34})
    picture = encoded(np.zeros((2000, 3000, 3), np.uint8), "JPEG")
    large = multipart({"type": "ResNet", "depth": 18}, picture, preprocess={"mode": "native"})
    process.allow_more_memory(250 * MEGABYTE)
    refused = process.http.post("/features", **large)
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/out-of-memory")
    assert int(refused.headers["Retry-After"]) >= 1
    assert len(process.http.get("/models").json()["models"]) == 1
    ask(process, {"type": "ResNet", "depth": 18})
    assert process.http.get("/healthz").status_code == 200


def test_a_model_that_finds_no_memory_is_refused_and_the_others_answer(start: Start) -> None:
    process = start("--model-budget", "8000000000")
    ask(process, {"type": "ResNet", "depth": 18})
    wide = {"type": "ResNet", "depth": 152, "base_channels": 128}
    process.allow_more_memory(200 * MEGABYTE)
    refused = process.http.post("/models", json={"backbone": wide})
    assert (refused.status_code, refused.json()["type"]) == (503, "/problems/out-of-memory")
    ask(process, {"type": "ResNet", "depth": 18})
    assert process.http.get("/models").json()["budget"]["used"] < 100 * MEGABYTE
