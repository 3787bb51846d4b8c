"""What requests take of the machine's memory together, through the door."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.conftest import RunningService, Serve, encoded, multipart

SMALL = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0]}
NATIVE = {"mode": "native"}


def picture(height: int, width: int, form: str = "JPEG") -> bytes:
    return encoded(np.full((height, width, 3), 90, np.uint8), form)


def used(service: RunningService) -> int:
    return int(service.engine.memory.shares.used)


@contextmanager
def all_memory_taken(service: RunningService) -> Iterator[None]:
    """As if requests that take all there is were running."""
    shares = service.engine.memory.shares
    loop = service.engine._loop

    async def take() -> Any:
        share = shares.share("others")
        await share.take(shares.largest)
        rest = shares.share("others")
        while rest.take_now(min(shares.small, shares.capacity - shares.used) or 1):
            pass
        return share, rest

    taken = asyncio.run_coroutine_threadsafe(take(), loop).result(30)
    try:
        yield
    finally:
        for share in taken:
            loop.call_soon_threadsafe(share.let_go)


def test_a_request_that_never_fits_is_refused_with_the_number_before_it_is_decoded(serve: Serve) -> None:
    service = serve(work_memory="40000000")
    image = picture(2000, 2000)
    refused = service.http.post("/features", **multipart(SMALL, image, preprocess=NATIVE))
    assert refused.status_code == 413
    found = re.search(
        r"would take about ([\d,]+) bytes of memory; the limit is ([\d,]+)", refused.json()["detail"]
    )
    assert found
    wanted, limit = (int(number.replace(",", "")) for number in found.groups())
    assert wanted > 2000 * 2000 * 12 > limit
    assert service.http.post("/features", **multipart(SMALL, picture(100, 100))).status_code == 200
    assert used(service) == 0


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_request_that_gets_no_memory_in_time_is_told_to_come_back(serve: Serve, form: str) -> None:
    service = serve(work_memory="200000000", request_timeout=2.0)
    image = picture(300, 400, form)
    assert service.http.post("/features", **multipart(SMALL, image)).status_code == 200
    with all_memory_taken(service):
        taken = re.search(
            r"^backbone_work_memory_bytes (\S+)$", service.http.get("/metrics").text, re.MULTILINE
        )
        assert taken
        assert float(taken[1]) > 100_000_000
        late = service.http.post("/features", **multipart(SMALL, image))
    assert (late.status_code, late.json()["type"]) == (503, "/problems/out-of-memory")
    assert int(late.headers["Retry-After"]) >= 1
    assert service.http.post("/features", **multipart(SMALL, image)).status_code == 200
    assert used(service) == 0


def test_a_request_that_waits_for_memory_is_answered_when_there_is_some(serve: Serve) -> None:
    service = serve(work_memory="200000000")
    image = picture(300, 400)
    assert service.http.post("/features", **multipart(SMALL, image)).status_code == 200
    with ThreadPoolExecutor(4) as clients:
        with all_memory_taken(service):
            replies = [
                clients.submit(service.http.post, "/features", **multipart(SMALL, image)) for _ in range(4)
            ]
        assert [reply.result().status_code for reply in replies] == [200] * 4
    assert used(service) == 0


def test_a_burst_of_large_images_never_takes_more_than_there_is(serve: Serve) -> None:
    service = serve(work_memory="400000000")
    shares = service.engine.memory.shares
    granted: list[int] = []
    grant = shares._grant

    def noted(share: Any, amount: int) -> None:
        grant(share, amount)
        granted.append(shares.used)

    shares._grant = noted
    images = [picture(450, 600 + step) for step in range(12)]

    def ask(image: bytes) -> int:
        parts = multipart(SMALL, image, preprocess=NATIVE)
        return int(service.http.post("/features", **parts).status_code)

    with ThreadPoolExecutor(12) as clients:
        statuses = list(clients.map(ask, images))
    assert statuses == [200] * 12
    assert max(granted) <= shares.capacity
    assert used(service) == 0


@pytest.mark.parametrize(
    ("parts", "status"),
    [
        ({"image": b"\xff\xd8\xff" + bytes(100)}, 400),
        ({"image": picture(60, 60)[:-200]}, 400),
        ({"image": picture(60, 60), "pool": "cls"}, 422),
        ({"tensor": np.full((1, 3, 64, 64), np.nan, np.float32)}, 400),
        ({"tensor": np.full((1, 3, 64, 64), 3e38, np.float32)}, 422),
    ],
    ids=["no image", "truncated", "no class token", "NaN in", "NaN out"],
)
def test_a_request_that_fails_gives_its_memory_back(service: RunningService, parts: Any, status: int) -> None:
    assert service.http.post("/features", **multipart(SMALL, **parts)).status_code == status
    assert used(service) == 0


def test_replies_are_weighed_before_anything_is_decoded_in_every_form(serve: Serve) -> None:
    service = serve(max_reply_bytes=3_000_000)
    truncated = picture(1500, 1500)[:-20_000]  # its header says what it would be
    config = {**SMALL, "out_indices": [0, 1, 2, 3], "base_channels": 32}
    forms: list[tuple[str, dict[str, Any]]] = [
        ("application/json", {"return": "tensors"}),
        ("application/json", {"return": "tensors", "encoding": "base64"}),
        ("application/x-npz", {}),
        ("application/vnd.safetensors", {"dtype": "float16"}),
        ("application/vnd.apache.arrow.stream", {}),
    ]
    for accept, more in forms:
        parts = multipart(config, truncated, preprocess=NATIVE, **more)
        refused = service.http.post("/features", headers={"Accept": accept}, **parts)
        assert refused.status_code == 413, accept
        assert "the limit is 3,000,000" in refused.json()["detail"]
    pooled = multipart(config, picture(1500, 1500), preprocess=NATIVE, pool="avg", **{"return": "tensors"})
    assert service.http.post("/features", **pooled).status_code == 200
    assert used(service) == 0
