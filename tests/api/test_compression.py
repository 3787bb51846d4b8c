"""`Accept-Encoding` over HTTP: what is compressed, what is not, and what the headers say of it."""

from __future__ import annotations

import gc
import gzip
import logging
import queue
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import zstandard

from service.client import BackboneClient
from service.protocol.decode import decode
from service.protocol.negotiate import MEDIA_TYPES, NPY, SAFETENSORS
from tests.api.problems import assert_problem
from tests.conftest import RunningService, Serve, encoded, multipart

THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [3]}
IMAGE = encoded(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
HABIT = "gzip, deflate, br, zstd"
READERS = {"gzip": gzip.decompress, "zstd": lambda data: zstandard.ZstdDecompressor().decompress(data)}
MEGABYTE = 2**20


def raw(
    http: httpx.Client, method: str, path: str, accept_encoding: str | None, **given: Any
) -> httpx.Response:
    """A reply whose `content` is the bytes on the wire."""
    request = http.build_request(method, path, **given)
    del request.headers["accept-encoding"]  # the client's own
    if accept_encoding is not None:
        request.headers["accept-encoding"] = accept_encoding
    reply = http.send(request, stream=True)
    body = b"".join(reply.iter_raw())
    plain = httpx.Headers([pair for pair in reply.headers.raw if pair[0].lower() != b"content-encoding"])
    found = httpx.Response(reply.status_code, headers=plain, content=body)
    found.headers["x-coding"] = reply.headers.get("content-encoding", "identity")
    found.headers["x-length"] = reply.headers.get("content-length", "none")
    return found


def features(
    http: httpx.Client,
    accept: str,
    accept_encoding: str | None,
    *,
    headers: dict[str, str] | None = None,
    **parts: Any,
) -> httpx.Response:
    given = {"Accept": accept, **(headers or {})}
    form = multipart(THIN, image=IMAGE, **{"return": "tensors", **parts})
    return raw(http, "POST", "/features", accept_encoding, headers=given, **form)


@pytest.mark.parametrize("coding", READERS)
@pytest.mark.parametrize("accept", MEDIA_TYPES)
def test_every_format_comes_in_the_coding_that_was_asked_for(
    http: httpx.Client, accept: str, coding: str
) -> None:
    plain, packed = features(http, accept, None), features(http, accept, coding)
    assert (plain.headers["x-coding"], packed.headers["x-coding"]) == ("identity", coding)
    assert int(packed.headers["x-length"]) == len(packed.content)
    assert packed.headers["vary"] == plain.headers["vary"] == "Accept, Accept-Encoding"
    assert packed.headers["etag"] == plain.headers["etag"]
    body = READERS[coding](packed.content)
    arrays = [decode(accept, data).arrays for data in (plain.content, body)]
    for name, array in arrays[0].items():
        np.testing.assert_array_equal(arrays[1][name], array)


@pytest.mark.parametrize(
    ("accept_encoding", "coding"),
    [
        (None, "identity"),
        ("", "identity"),
        (HABIT, "identity"),  # what libraries send unasked
        ("gzip, deflate", "identity"),
        ("gzip, deflate, identity;q=0", "gzip"),
        ("deflate, gzip, br, zstd", "zstd"),  # curl --compressed
        ("gzip;q=0.5, zstd;q=0.4", "gzip"),
        ("*", "gzip"),
        ("br", "identity"),
        ("zstd;q=0, gzip;q=0", "identity"),
        ("gzip," * 200_000, "identity"),
        (";=,q" * 200, "identity"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_maps_are_compressed_for_who_asks(
    http: httpx.Client, accept_encoding: str | None, coding: str
) -> None:
    assert features(http, SAFETENSORS, accept_encoding).headers["x-coding"] == coding


def test_a_small_reply_is_compressed_only_for_who_refuses_it_plain(http: httpx.Client) -> None:
    config = {**THIN, "base_channels": 1, "stem_channels": 1}

    def npy(accept_encoding: str) -> httpx.Response:
        form = multipart(config, image=IMAGE, pool="avg")
        return raw(http, "POST", "/features", accept_encoding, headers={"Accept": NPY}, **form)

    plain, packed = npy("gzip"), npy("gzip, identity;q=0")
    assert len(plain.content) < 1024
    assert (plain.headers["x-coding"], packed.headers["x-coding"]) == ("identity", "gzip")
    assert gzip.decompress(packed.content) == plain.content


@pytest.mark.parametrize("path", ["/backbones", "/openapi.json", "/metrics", "/backbones/ResNet"])
@pytest.mark.parametrize("accept_encoding", [None, "gzip", "zstd", HABIT])
def test_long_texts_are_compressed(http: httpx.Client, path: str, accept_encoding: str | None) -> None:
    reply = raw(http, "GET", path, accept_encoding)
    coding = reply.headers["x-coding"]
    assert coding == {None: "identity", "gzip": "gzip"}.get(accept_encoding, "zstd")
    assert "Accept-Encoding" in reply.headers["vary"]
    assert int(reply.headers["x-length"]) == len(reply.content)
    if coding != "identity":
        text = READERS[coding](reply.content)
        assert len(reply.content) < len(text)
        assert path == "/metrics" or text == raw(http, "GET", path, None).content


def test_short_texts_are_not(http: httpx.Client) -> None:
    reply = raw(http, "GET", "/healthz", "gzip")
    assert (reply.headers["x-coding"], reply.json()) == ("identity", {"status": "ok"})
    assert reply.headers["vary"] == "Accept-Encoding"


@pytest.mark.parametrize(
    "refusing", ["identity;q=0", "*;q=0", "br, *;q=0", "identity;q=0, gzip;q=0, zstd;q=0"]
)
@pytest.mark.parametrize("path", ["/version", "/features"])
def test_who_takes_nothing_that_is_served_is_told_so(http: httpx.Client, path: str, refusing: str) -> None:
    method = "POST" if path == "/features" else "GET"
    reply = http.request(method, path, headers={"Accept-Encoding": refusing})
    assert "zstd, gzip and identity" in assert_problem(reply, 406, "not-acceptable")["detail"]


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "PUT"])
def test_a_method_that_is_not_served_stays_refused(http: httpx.Client, method: str) -> None:
    for path in ("/features", "/backbones"):
        reply = http.request(method, path, headers={"Accept-Encoding": "gzip, identity;q=0"})
        assert reply.status_code == 405
        assert reply.headers["content-type"] == "application/problem+json"
        assert (reply.content == b"") == (method == "HEAD")


def test_an_etag_holds_in_every_coding(http: httpx.Client) -> None:
    etag = features(http, SAFETENSORS, None).headers["etag"]
    assert etag.startswith('W/"')
    for accept_encoding in (None, "gzip", "zstd", "identity;q=0, gzip"):
        reply = features(http, SAFETENSORS, accept_encoding, headers={"If-None-Match": etag})
        assert (reply.status_code, reply.content, reply.headers["x-coding"]) == (304, b"", "identity")
        assert reply.headers["vary"] == "Accept, Accept-Encoding"


def test_an_error_is_a_problem_in_every_coding(http: httpx.Client) -> None:
    for accept_encoding in ("gzip", "zstd", "gzip, identity;q=0"):
        form = multipart({"type": "NoSuch"}, image=IMAGE)
        reply = http.post("/features", headers={"Accept-Encoding": accept_encoding}, **form)
        assert_problem(reply, 404, "unknown-backbone")


def test_our_client_asks_for_compressed_replies_only_when_told_to(service: RunningService) -> None:
    seen: list[str] = []
    arrays = []
    for compressed in (False, True):
        with BackboneClient(service.url, compressed=compressed) as client:
            client._http.event_hooks["response"].append(
                lambda reply: seen.append(reply.headers.get("content-encoding", "identity"))
            )
            arrays.append(client.features(IMAGE, backbone=THIN).arrays["3"])
    assert seen == ["identity", "zstd"]
    np.testing.assert_array_equal(*arrays)


# --- clients that leave in the middle -----------------------------------------------------------


@pytest.fixture
def answered() -> Iterator[queue.Queue[logging.LogRecord]]:
    """The lines of the access log, as they come."""
    lines: queue.Queue[logging.LogRecord] = queue.Queue()
    handler = logging.Handler()
    handler.emit = lines.put  # type: ignore[method-assign]  # all that a handler does
    log = logging.getLogger("service.access")
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    yield lines
    log.removeHandler(handler)
    log.setLevel(before)


def leave_early(service: RunningService, path: str, body: bytes, headers: str) -> None:
    """Ask for a reply of 59 MB, read 1 MB of it, and go."""
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(head.encode() + body)
        received = 0
        while received < MEGABYTE:
            received += len(connection.recv(65536))


def test_nothing_is_kept_of_large_replies_whose_readers_left(
    serve: Serve, answered: queue.Queue[logging.LogRecord]
) -> None:
    service = serve(engine="torch")  # no other engine is made meanwhile, which would take memory too
    large = encoded(np.full((960, 960, 3), 77, np.uint8))  # [1, 64, 480, 480] float32 are 59 MB
    query = httpx.QueryParams(
        {
            "backbone": '{"type":"torchvision.resnet18","return_nodes":["relu"]}',
            "preprocess": "native",
        }
    )
    headers = f"Content-Type: image/png\r\nAccept: {SAFETENSORS}\r\n"
    resident = []
    for _ in range(5):
        leave_early(service, f"/features?{query}", large, headers)
        assert answered.get(timeout=60).args[1] == "/features"  # the request is over, whatever became of it
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] - resident[1] < 60 * MEGABYTE
    assert service.http.get("/metrics").text.count("\nbackbone_in_flight_requests 1.0") == 1  # this one
