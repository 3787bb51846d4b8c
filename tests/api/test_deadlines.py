"""How long a request may take, what is dropped when that is over, and how many may be under way."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from service.runtime.fair_threads import FairThreads
from tests.api.problems import assert_problem
from tests.api.test_concurrency import held_device, raw_request, wait_for_queue
from tests.conftest import RunningService, Serve, encoded, multipart

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [3]}
TENSOR = np.zeros((1, 3, 32, 32), np.float32)
SOON = {"X-Request-Timeout": "0.3"}


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def ask(service: RunningService, images: int = 1, **headers: str) -> httpx.Response:
    body = multipart(THIN, tensor=np.repeat(TENSOR, images, axis=0))
    return service.http.post("/features", **body, headers=headers)


@contextmanager
def all_busy(executor: Executor, threads: int) -> Iterator[None]:
    """Has all threads of a pool wait."""
    inside, go_on = threading.Barrier(threads + 1), threading.Event()

    def hold() -> None:
        inside.wait(30)
        assert go_on.wait(60)

    held = [executor.submit(hold) for _ in range(threads)]
    inside.wait(30)
    try:
        yield
    finally:
        go_on.set()
        wait(held, 60)


# --- X-Request-Timeout --------------------------------------------------------------------------


def test_a_request_may_ask_for_less_time_than_the_service_gives(serve: Serve) -> None:
    service = serve()
    assert ask(service).status_code == 200
    with held_device(service):
        body = assert_problem(ask(service, **SOON), 504, "deadline-exceeded")
    assert "longer than 0.3 s" in body["detail"]


def test_a_request_cannot_ask_for_more_time_than_the_service_gives(serve: Serve) -> None:
    service = serve(request_timeout=0.5)
    # a body that never ends, so that not even a slow machine answers before
    with socket.create_connection(("127.0.0.1", service.http.base_url.port or 0), 60) as connection:
        connection.sendall(half_a_request("999999999"))
        reply = connection.recv(4096).decode()
    assert reply.startswith("HTTP/1.1 504 ")
    assert "longer than 0.5 s" in reply


def half_a_request(seconds: str) -> bytes:
    return (
        "POST /backbones/inspect HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"X-Request-Timeout: {seconds}\r\nContent-Length: 100\r\n\r\n{{"
    ).encode()


@pytest.mark.parametrize(
    "value", [b"soon", b"-1", b"1e3", b"nan", b"inf", b"1,5", b"0x1", b"1 s", b"1" * 10, b".5", "٣".encode()]
)
def test_a_timeout_that_is_no_number_of_seconds_is_refused(http: httpx.Client, value: bytes) -> None:
    body = assert_problem(http.get("/models", headers={b"X-Request-Timeout": value}), 400, "invalid-header")
    assert "X-Request-Timeout must be seconds" in body["detail"]


@pytest.mark.parametrize("second", ["7", "nan"])
def test_two_timeouts_are_no_number_of_seconds(http: httpx.Client, second: str) -> None:
    twice = [("X-Request-Timeout", "7"), ("X-Request-Timeout", second)]
    assert_problem(http.get("/models", headers=twice), 400, "invalid-header")


def test_a_request_without_any_time_is_not_served(service: RunningService) -> None:
    assert_problem(ask(service, **{"X-Request-Timeout": "0"}), 504, "deadline-exceeded")


Request = Callable[[RunningService], httpx.Response]


def inspect(service: RunningService) -> httpx.Response:
    return service.http.post("/backbones/inspect", json={"backbone": THIN}, headers=SOON)


def describe(service: RunningService) -> httpx.Response:
    return service.http.get("/backbones/timm.resnet18", headers=SOON)


def load(service: RunningService) -> httpx.Response:
    return service.http.post("/models", json={"backbone": THIN}, headers=SOON)


@pytest.mark.parametrize("request_of", [inspect, describe, load, ask])
def test_the_deadline_passes_while_others_are_planned(serve: Serve, request_of: Request) -> None:
    service = serve()
    with all_busy(service.engine._plans.of("others"), 2):
        late = ask(service, **SOON) if request_of is ask else request_of(service)
    assert_problem(late, 504, "deadline-exceeded")


def test_the_deadline_passes_before_an_image_is_decoded(serve: Serve) -> None:
    service = serve(decode_threads=1)
    assert ask(service).status_code == 200
    image = encoded(np.zeros((8, 8, 3), np.uint8))
    with all_busy(service.engine._codecs.of("others"), 1):
        late = service.http.post("/features", **multipart(THIN, image), headers=SOON)
    assert_problem(late, 504, "deadline-exceeded")


def test_the_deadline_passes_before_a_reply_is_encoded(serve: Serve, clients: ThreadPoolExecutor) -> None:
    service = serve(decode_threads=1)
    assert ask(service).status_code == 200
    headers = {"Accept": "application/x-npz", "X-Request-Timeout": "2"}
    with held_device(service) as held:
        reply = clients.submit(ask, service, **headers)
        assert held.wait(30)
        busy = all_busy(service.engine._codecs.of("others"), 1)
        busy.__enter__()
    assert_problem(reply.result(60), 504, "deadline-exceeded")
    busy.__exit__(None, None, None)


# --- who leaves ---------------------------------------------------------------------------------


def test_what_was_not_begun_for_a_client_that_left_is_not_done(serve: Serve) -> None:
    service = serve(decode_threads=1)
    assert ask(service).status_code == 200
    codecs = service.engine._codecs
    with all_busy(codecs.of("others"), 1):
        leaver = raw_request(service)
        waiting = next_submitted(codecs)
        leaver.close()
        done = threading.Event()
        waiting.add_done_callback(lambda _: done.set())
        assert done.wait(30)
        assert waiting.cancelled()


def next_submitted(pool: FairThreads) -> Future[Any]:
    """The first call that waits for a thread, as soon as there is one."""
    with pool._changed:
        assert pool._changed.wait_for(lambda: pool._lines.active, 30)
        return next(iter(pool._lines.in_order()[0].calls))


# --- too much at once ---------------------------------------------------------------------------


def test_requests_beyond_what_may_be_in_flight_are_refused_unread(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve(max_requests=2)
    assert ask(service).status_code == 200
    with held_device(service) as held:
        first = clients.submit(ask, service)
        assert held.wait(30)
        second = clients.submit(ask, service)
        wait_for_queue(service, 1)
        body = assert_problem(ask(service), 503, "queue-full")
        assert "2 requests are in flight" in body["detail"]
        assert service.http.get("/readyz").status_code == 200
    assert [first.result(60).status_code, second.result(60).status_code] == [200, 200]
    assert ask(service).status_code == 200
    counted = 'backbone_requests_total{method="POST",route="/features",status="503"} 1.0'
    assert counted in service.http.get("/metrics").text.splitlines()


def test_who_would_wait_too_long_is_refused_before_anything_is_decoded(
    serve: Serve, clients: ThreadPoolExecutor
) -> None:
    service = serve(max_wait=1e-9, megapixels_per_minute=1)
    codecs = service.engine._codecs
    large = encoded(np.zeros((900, 1000, 3), np.uint8))
    for _ in range(20):  # few do not tell how long others take
        assert ask(service).status_code == 200
    with held_device(service) as held:
        running = clients.submit(ask, service)
        assert held.wait(30)
        waiting = clients.submit(ask, service)
        wait_for_queue(service, 1)
        with all_busy(codecs.of("others"), len(codecs._threads)):
            refused = service.http.post("/features", **multipart(THIN, image=large))
        body = assert_problem(refused, 503, "queue-full")
        assert "this request may wait for 0.0 s" in body["detail"]
        assert int(refused.headers["retry-after"]) >= 1
    assert [running.result(60).status_code, waiting.result(60).status_code] == [200, 200]
    # of the 1 megapixel of its minute it has used nothing
    assert service.http.post("/features", **multipart(THIN, image=large)).status_code == 200
