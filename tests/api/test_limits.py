"""What a connection and a request may bring, over real sockets: bytes, numbers and time."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from service.api.connections import (
    LINGER_BYTES,
    MAX_FRAMING_BYTES,
    MAX_HEADER_BYTES,
    MAX_HEADERS,
    MAX_PIPELINED,
    MAX_TARGET_BYTES,
    SPARE_CONNECTIONS,
)
from tests.api.problems import assert_problem
from tests.api.raw import RawClient
from tests.conftest import RunningService, Serve, encoded, multipart, settings_for

CONFIG = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}
SMALL = encoded(np.full((48, 64, 3), 77, np.uint8))
GET = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"
POST = b"POST /features HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MEGABYTE = 2**20
PIECE = bytes(64 * 1024)


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """A service that gives its clients little time and takes bodies of a megabyte."""
    folder = tmp_path_factory.mktemp("strict")
    given = {"header_timeout": 0.4, "body_timeout": 0.4, "reply_timeout": 0.8, "max_body_bytes": MEGABYTE}
    with RunningService(settings_for(folder, **given)) as running:
        yield running


@pytest.fixture
def client(service: RunningService) -> Iterator[RawClient]:
    with RawClient(service.url) as one:
        yield one


@pytest.fixture
def hurried(strict: RunningService) -> Iterator[RawClient]:
    with RawClient(strict.url) as one:
        yield one


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + len(PIECE)] for start in range(0, len(data), len(PIECE))]


def count(service: RunningService, name: str, **labels: str) -> float:
    """A number of `GET /metrics`."""
    text = ",".join(f'{key}="{value}"' for key, value in labels.items())
    start = f"{name}{{{text}}} " if labels else f"{name} "
    lines = service.http.get("/metrics").text.splitlines()
    return next((float(line.removeprefix(start)) for line in lines if line.startswith(start)), 0.0)


# --- the head of a request ----------------------------------------------------------------------

HEADS = {
    "a header of a megabyte": (GET + b"A: " + b"a" * MEGABYTE, 431, "headers-too-large"),
    "a header name of a megabyte": (GET + b"A" * MEGABYTE, 431, "headers-too-large"),
    "10,000 headers": (GET + b"A: b\r\n" * 10_000 + b"\r\n", 431, "headers-too-large"),
    "one header too many": (GET + b"A: b\r\n" * MAX_HEADERS + b"\r\n", 431, "headers-too-large"),
    "a target of a megabyte": (b"GET /" + b"a" * MEGABYTE, 414, "target-too-long"),
    "a query of a megabyte": (b"POST /features?backbone=" + b"a" * MEGABYTE, 414, "target-too-long"),
    "a target one byte too long": (b"GET /" + b"a" * MAX_TARGET_BYTES + b" ", 414, "target-too-long"),
    "a method of a megabyte": (b"G" * MEGABYTE, 400, "malformed-request"),
}


@pytest.mark.parametrize("name", HEADS)
def test_a_head_beyond_a_limit_is_refused_with_the_number(client: RawClient, name: str) -> None:
    data, status, kind = HEADS[name]
    client.send_until_refused(pieces(data))
    detail = client.reply().problem(status, kind)["detail"]
    assert status == 400 or any(f"{limit:,}" in detail for limit in (MAX_HEADER_BYTES, MAX_TARGET_BYTES))
    assert client.is_closed()


def test_a_head_just_within_the_limits_is_served(client: RawClient) -> None:
    room = MAX_HEADER_BYTES - len("Host: x\r\n") - len("A: \r\n") - (MAX_HEADERS - 2) * len("A: b\r\n")
    headers = b"A: b\r\n" * (MAX_HEADERS - 2) + b"A: " + b"a" * room
    client.send(b"GET /healthz?" + b"a" * (MAX_TARGET_BYTES - 9) + b" HTTP/1.1\r\nHost: x\r\n" + headers)
    client.send(b"\r\n\r\n")
    assert client.reply().status == 200


def test_a_header_in_small_pieces_is_counted_too(client: RawClient) -> None:
    client.send(GET)
    sent = client.send_until_refused(b"A: " + b"a" * 1000 for _ in range(1000))
    client.reply().problem(431, "headers-too-large")
    assert sent <= 1_003_000


NO_REQUESTS = {
    "a length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunks and a length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
    "one length twice": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "a list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "a negative length": POST + b"Content-Length: -1\r\n\r\n",
    "a length with a sign": POST + b"Content-Length: +2\r\n\r\n{}",
    "a length of 30 digits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "another transfer coding": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "no transfer coding": POST + b"Transfer-Encoding: identity\r\n\r\n{}",
    "chunks twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunks in two headers": POST + b"Transfer-Encoding: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a blank before a colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": CHUNKED + b"zz\r\n",
    "a chunk size of 80 bits": CHUNKED + b"f" * 20 + b"\r\n",
    "a negative chunk size": CHUNKED + b"-1\r\n",
    "a chunk size with 0x": CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n",
    "a chunk that is longer than its size": CHUNKED + b"2\r\n{}X",
    "a chunk extension of 3 MB": CHUNKED + b"2;" + b"a" * 3 * MEGABYTE + b"\r\n{}\r\n0\r\n\r\n",
    "200,000 chunks of a byte": CHUNKED + b"1\r\n \r\n" * 200_000 + b"0\r\n\r\n",
    "no Host": b"GET /healthz HTTP/1.1\r\n\r\n",
    "two Hosts": GET + b"Host: y\r\n\r\n",
    "lines that end in LF": b"GET /healthz HTTP/1.1\nHost: x\n\n",
    "a header over two lines": GET + b"A: a\r\n b\r\n\r\n",
    "a carriage return in a header": GET + b"A: a\rB: c\r\n\r\n",
    "a NUL in a header": GET + b"A: a\0b\r\n\r\n",
    "a NUL in the target": b"GET /a\0b HTTP/1.1\r\nHost: x\r\n\r\n",
    "a target that is not ASCII": "GET /ä HTTP/1.1\r\nHost: x\r\n\r\n".encode(),
    "a tunnel": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "another version": b"GET /healthz HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /healthz\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(190),
    "noise": b"\x00\x01\x02\xff" * 10,
}


@pytest.mark.parametrize("name", NO_REQUESTS)
def test_what_is_no_request_is_refused_and_the_connection_closed(client: RawClient, name: str) -> None:
    client.send_until_refused(pieces(NO_REQUESTS[name]))
    client.reply().problem(400, "malformed-request")
    assert client.is_closed()


def test_a_refusal_of_what_is_no_request_has_the_headers_of_every_reply(client: RawClient) -> None:
    client.send(b"GET\r\n\r\n")
    reply = client.reply()
    assert reply.status == 400
    assert {"date", "server-timing", "traceresponse", "x-content-type-options"} <= set(reply.headers)


def test_blanks_around_a_value_are_none_of_it(client: RawClient) -> None:
    for name, value in {
        "X-Request-ID": b"mine",
        "X-Request-Timeout": b"5",
        "Content-Encoding": b"Identity",
    }.items():
        for padded in (value, b" \t" + value + b"\t ", value + b" "):
            client.send(GET.replace(b"/healthz", b"/models") + name.encode() + b":" + padded + b"\r\n\r\n")
            reply = client.reply()
            assert reply.status == 200, (name, padded, reply.body)
            assert name != "X-Request-ID" or reply.headers["x-request-id"] == "mine"
    client.send(CHUNKED.replace(b"chunked", b"chunked ") + b"2\r\n{}\r\n0\r\n\r\n")
    assert client.reply().status == 422


def test_trailers_are_dropped_and_counted(client: RawClient) -> None:
    body = json.dumps({"backbone": CONFIG, "images": [{"base64": ""}]}).encode()
    chunk = b"%x\r\n%s\r\n0\r\n" % (len(body), body)
    client.send(CHUNKED + chunk + b"Content-Type: text/plain\r\nAccept: x/y\r\n\r\n")
    assert client.reply().status == 422
    client.send_until_refused(pieces(CHUNKED + chunk + b"A: b\r\n" * 100_000))
    client.reply().problem(431, "headers-too-large")


def test_small_chunks_are_served_up_to_what_a_quarter_of_the_body_pays(client: RawClient) -> None:
    body = json.dumps({"backbone": CONFIG, "images": []}).encode().ljust(MAX_FRAMING_BYTES // 8)
    client.send(CHUNKED + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n")
    assert client.reply().status == 422


@pytest.mark.parametrize("upgrade", [b"websocket", b"h2c", b"TLS/1.3"])
def test_an_upgrade_is_not_made_and_the_request_answered(client: RawClient, upgrade: bytes) -> None:
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
    client.send(GET + b"Connection: Upgrade\r\nUpgrade: " + upgrade + b"\r\n" + key + b"\r\n")
    reply = client.reply()
    assert (reply.status, reply.headers["connection"]) == (200, "close")
    assert client.is_closed()


def test_other_forms_of_requests_are_served(service: RunningService) -> None:
    for request in (
        b"GET /healthz HTTP/1.0\r\n\r\n",
        b"GET http://other.example/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
        GET + b"Content-Length: 5\r\n\r\nhello",
    ):
        with RawClient(service.url) as client:
            client.send(request)
            assert client.reply().status == 200


def test_requests_sent_ahead_are_answered_before_what_is_none(client: RawClient) -> None:
    client.send((GET + b"\r\n") * 5 + b"\0junk")
    assert [client.reply().status for _ in range(5)] == [200] * 5
    assert client.is_closed()


def test_only_so_many_requests_may_be_sent_ahead(client: RawClient) -> None:
    client.send_until_refused([(GET + b"\r\n") * 10_000])
    answered = 0
    with contextlib.suppress(IndexError):  # an empty line: the end
        while client.reply().status == 200:
            answered += 1
    assert answered == MAX_PIPELINED + 1


# --- early answers ------------------------------------------------------------------------------


def test_a_body_that_is_too_large_by_its_length_is_refused_before_it_is_asked_for(client: RawClient) -> None:
    client.send(POST + b"Expect: 100-continue\r\nContent-Length: 100000000\r\n\r\n")
    assert "20,000,000" in client.reply().problem(413, "too-large")["detail"]


def test_who_has_no_key_is_told_so_before_the_body_is_asked_for(serve: Serve) -> None:
    with RawClient(serve(api_keys="a").url) as client:
        client.send(POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n")
        client.reply().problem(401, "unauthenticated")


def test_a_coding_in_a_second_header_is_seen_too(service: RunningService) -> None:
    twice = [("Content-Encoding", "identity"), ("Content-Encoding", "gzip")]
    assert_problem(service.http.post("/features", headers=twice, content=b"{}"), 415, "unsupported-media")


def test_a_body_is_asked_for_where_the_client_waits_for_that(client: RawClient) -> None:
    client.send(POST + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
    assert client.reply().status == 100
    client.send(b"{}")
    assert client.reply().status == 422


def test_a_body_is_counted_as_it_comes(client: RawClient) -> None:
    client.send(CHUNKED)
    chunk = b"%x\r\n%s\r\n" % (len(PIECE), PIECE)
    client.send_until_refused(chunk for _ in range(20_000_000 // len(PIECE) + 2))
    assert "20,000,000" in client.reply().problem(413, "too-large")["detail"]


def test_a_connection_stays_open_after_a_refusal_whose_body_came(client: RawClient) -> None:
    for _ in range(2):
        client.send(POST + b"Content-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello")
        reply = client.reply()
        assert (reply.status, "connection" in reply.headers) == (415, False)


def test_what_an_early_answer_leaves_unread_is_bounded(client: RawClient) -> None:
    client.send(POST + b"Content-Length: 10000000000\r\n\r\n")
    client.reply().problem(413, "too-large")
    piece = bytes(MEGABYTE)
    sent = client.send_until_refused(piece for _ in range(2 * LINGER_BYTES // MEGABYTE))
    assert LINGER_BYTES // 2 < sent < 2 * LINGER_BYTES


def upload() -> Iterator[bytes]:
    for _ in range(100_000_000 // len(PIECE)):
        yield PIECE


@pytest.mark.parametrize("length", [{}, {"Content-Length": str(100_000_000 // len(PIECE) * len(PIECE))}])
def test_httpx_sees_the_answer_to_an_upload_that_is_too_large(
    service: RunningService, length: dict[str, str]
) -> None:
    headers = {"Content-Type": "image/png", **length}
    reply = service.http.post("/features?backbone=resnet50", content=upload(), headers=headers)
    assert "20,000,000" in assert_problem(reply, 413, "too-large")["detail"]


@pytest.mark.parametrize("header", ["Expect:", "Expect: 100-continue", "Transfer-Encoding: chunked"])
def test_curl_sees_the_answer_to_an_upload_that_is_too_large(
    service: RunningService, tmp_path: Path, header: str
) -> None:
    curl = shutil.which("curl")
    if curl is None:
        pytest.skip("needs curl")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(100_000_000)
    arguments = ["-sS", "-H", header, "-H", "Content-Type: image/png", "--data-binary", f"@{large}"]
    url = f"{service.url}/features?backbone=resnet50"
    done = subprocess.run([curl, *arguments, url], capture_output=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == 413


# --- time ---------------------------------------------------------------------------------------


def test_headers_that_do_not_come_in_time_are_408(hurried: RawClient) -> None:
    hurried.send(GET)
    assert "0.4 s" in hurried.reply().problem(408, "slow-request")["detail"]
    assert hurried.is_closed()


def test_a_connection_without_a_request_is_closed(strict: RunningService, hurried: RawClient) -> None:
    before = count(strict, "backbone_dropped_connections_total", reason="no request")
    assert hurried.is_closed()
    assert count(strict, "backbone_dropped_connections_total", reason="no request") == before + 1


def test_empty_lines_before_a_request_are_part_of_its_time(hurried: RawClient) -> None:
    hurried.send(GET + b"\r\n")
    assert hurried.reply().status == 200
    hurried.send(b"\r\n")
    hurried.reply().problem(408, "slow-request")


@pytest.mark.parametrize("head", [POST + b"Content-Length: 1000\r\n\r\n", CHUNKED + b"3e8\r\n"])
@pytest.mark.parametrize("body", [b"", b"{"])
def test_a_body_that_stops_is_408(hurried: RawClient, head: bytes, body: bytes) -> None:
    hurried.send(head + body)
    assert "0.4 s" in hurried.reply().problem(408, "slow-request")["detail"]
    assert hurried.is_closed()


def test_500_bodies_that_stop_are_408_and_an_honest_client_is_served_meanwhile(
    strict: RunningService,
) -> None:
    threads = psutil.Process().num_threads()
    with contextlib.ExitStack() as stack:
        slow = []
        for _ in range(500):
            slow.append(stack.enter_context(RawClient(strict.url)))
            slow[-1].send(POST + b"Content-Length: 1000\r\n\r\n{")
        assert strict.http.post("/features", **multipart(CONFIG, SMALL)).status_code == 200
        assert psutil.Process().num_threads() < threads + 50
        for client in slow:
            client.reply().problem(408, "slow-request")
    assert count(strict, "backbone_body_bytes") == 0


@pytest.mark.parametrize("ahead", [b"", GET + b"\r\n"], ids=["alone", "with another sent ahead"])
def test_a_reply_that_is_not_read_ends_with_its_connection(
    strict: RunningService, hurried: RawClient, ahead: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    before = count(strict, "backbone_dropped_connections_total", reason="slow reader")
    image = encoded(np.full((1280, 1280, 3), 77, np.uint8))
    config = {**CONFIG, "base_channels": 64, "out_indices": [0, 1]}  # 39 MB, more than the system holds back
    query = httpx.QueryParams(backbone=json.dumps(config), preprocess='{"mode":"native"}')
    head = f"POST /features?{query} HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"
    head += f"Accept: application/vnd.safetensors\r\nContent-Length: {len(image)}\r\n\r\n"
    hurried.send(head.encode() + image + ahead)
    assert hurried.socket.recv(15) == b"HTTP/1.1 200 OK"
    while count(strict, "backbone_dropped_connections_total", reason="slow reader") == before:
        pass
    assert hurried.is_reset()
    strict.http.get("/healthz")  # behind what the reply's task had still to do
    assert "crashed" not in caplog.text


def test_a_body_that_comes_steadily_may_take_longer_than_its_time(serve: Serve) -> None:
    service = serve(body_timeout=1.5, min_rate=1000)
    with RawClient(service.url) as client:
        client.send(POST + b"Content-Length: 50001\r\n\r\n")
        for _ in range(25):
            client.send(bytes(2000))
            assert not client.is_answered(within_s=0.1)
        client.send(b"\0")
        assert json.loads(client.reply().body)["type"] == "/problems/malformed-body"


# --- how many -----------------------------------------------------------------------------------


def test_connections_beyond_the_limit_are_told_to_come_back(serve: Serve) -> None:
    service = serve(max_connections=3)
    with contextlib.ExitStack() as stack:
        held = busy_connections(stack, service, 3)
        with RawClient(service.url) as late:
            assert late.reply().problem(503, "service-busy")["detail"].startswith("all 3 connections")
            assert late.is_closed()
        held[0].send(bytes(99))
        assert held[0].reply().status == 400
        with RawClient(service.url) as next_one:
            next_one.send(GET + b"\r\n")
            assert next_one.reply().status == 200


def busy_connections(stack: contextlib.ExitStack, service: RunningService, number: int) -> list[RawClient]:
    """Connections with a request under way, each of which the service has begun to read."""
    clients = []
    for _ in range(number):
        client = stack.enter_context(RawClient(service.url))
        client.send(POST + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n")
        assert client.reply().status == 100
        client.send(b"{")
        clients.append(client)
    return clients


def test_connections_far_beyond_the_limit_are_told_so_and_kept_open_no_longer(serve: Serve) -> None:
    service = serve(max_connections=1)
    with contextlib.ExitStack() as stack:
        busy_connections(stack, service, 1)
        clients = [stack.enter_context(RawClient(service.url)) for _ in range(SPARE_CONNECTIONS + 20)]
        for client in clients:
            client.reply().problem(503, "service-busy")
        gauge = b"backbone_connections %.1f\n" % (1 + SPARE_CONNECTIONS)
        assert gauge in service.app.state.startup.metrics.text()


def test_who_was_answered_and_goes_on_sending_takes_nobodys_place(serve: Serve) -> None:
    service = serve(max_connections=3, max_requests=1)
    with contextlib.ExitStack() as stack:
        busy_connections(stack, service, 1)
        for _ in range(SPARE_CONNECTIONS + 20):
            refused = stack.enter_context(RawClient(service.url))
            refused.send(POST + b"Content-Length: 100\r\n\r\n{")
            refused.reply().problem(503, "queue-full")
        with RawClient(service.url) as probe:
            probe.send(GET + b"\r\n")
            assert probe.reply().status == 200


def test_the_connection_idle_for_longest_makes_room(serve: Serve) -> None:
    service = serve(max_connections=3)
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(RawClient(service.url)) for _ in range(2)]
        for client in idle:
            client.send(GET + b"\r\n")
            assert client.reply().status == 200
        busy_connections(stack, service, 1)
        late = stack.enter_context(RawClient(service.url))
        late.send(GET + b"\r\n")
        assert late.reply().status == 200
        assert idle[0].is_closed()
        idle[1].send(GET + b"\r\n")
        assert idle[1].reply().status == 200


def test_bodies_share_one_budget(serve: Serve) -> None:
    service = serve(body_budget=300_000)
    first = POST + b"Content-Length: 200000\r\n\r\n"
    with RawClient(service.url) as holder, RawClient(service.url) as other:
        holder.send(first + bytes(150_000))
        while count(service, "backbone_body_bytes") < 150_000:
            pass
        other.send(first)
        detail = other.reply().problem(503, "service-busy")["detail"]
        assert "300,000" in detail
        with RawClient(service.url) as undeclared:
            undeclared.send(CHUNKED + b"30d40\r\n" + bytes(200_000))
            undeclared.reply().problem(503, "service-busy")
        holder.send(bytes(50_000))
        assert holder.reply().status == 400
    while count(service, "backbone_body_bytes"):
        pass
    assert service.http.post("/features", **multipart(CONFIG, SMALL)).status_code == 200


# --- JSON and forms -----------------------------------------------------------------------------


def inspect(service: RunningService, **body: Any) -> httpx.Response:
    return service.http.post("/backbones/inspect", json=body)


@pytest.mark.parametrize(
    "config",
    [
        {**CONFIG, "out_indices": list(range(65))},
        {"type": "timm.resnet18", "out_indices": list(range(65))},
        {"type": "mmpretrain.VisionTransformer", "arch": "deit-tiny", "out_indices": list(range(65))},
        {"type": "torchvision.resnet18", "return_nodes": [f"layer{index}" for index in range(65)]},
        {
            "type": "torchvision.resnet18",
            "return_nodes": {f"layer{index}": f"{index}" for index in range(65)},
        },
    ],
)
def test_no_config_asks_for_more_than_64_levels(service: RunningService, config: dict[str, Any]) -> None:
    assert "64" in assert_problem(inspect(service, backbone=config), 422)["detail"]


def test_texts_of_a_form_that_are_too_large_are_413(service: RunningService) -> None:
    reply = service.http.post("/features", **multipart(" " * 300_000, SMALL))
    assert "262,144" in assert_problem(reply, 413, "too-large")["detail"]
    files = [("image", ("a", b"x"))] * 2049
    reply = service.http.post("/features", data={"backbone": "resnet50"}, files=files)
    assert "2,048" in assert_problem(reply, 413, "too-large")["detail"]


@pytest.mark.parametrize(
    "config",
    [{"type": "a" * 300_000}, {**CONFIG, "a" * 300_000: 1}, {**CONFIG, "a": ["b" * 1000] * 300}],
    ids=["a text", "a key", "many texts"],
)
def test_a_config_of_more_text_than_256_kib_is_413(service: RunningService, config: dict[str, Any]) -> None:
    image = {"base64": base64.b64encode(SMALL).decode()}
    features = service.http.post("/features", json={"backbone": config, "images": [image]})
    for reply in (features, inspect(service, backbone=config)):
        assert "262,144" in assert_problem(reply, 413, "too-large")["detail"]


def test_images_in_json_may_be_larger_than_configs(service: RunningService) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8)
    image = {"base64": base64.b64encode(encoded(noise)).decode()}
    assert len(image["base64"]) > 300_000
    assert service.http.post("/features", json={"backbone": CONFIG, "images": [image]}).status_code == 200


# --- open files ---------------------------------------------------------------------------------

CAPPED = """
import logging, resource, sys
soft, hard = int(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
logging.basicConfig(level=logging.WARNING)
from service.api.server import allowed_connections
print(allowed_connections(1000), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


@pytest.mark.parametrize(
    ("soft", "hard", "allowed", "warns"), [(256, 2048, "1000 1264", False), (256, 1024, "760 1024", True)]
)
def test_connections_are_no_more_than_the_files_a_process_may_open(
    soft: int, hard: int, allowed: str, warns: bool
) -> None:
    command = [sys.executable, "-c", CAPPED, str(soft), str(hard)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == allowed
    assert ("may open 1024 files" in done.stderr) == warns
