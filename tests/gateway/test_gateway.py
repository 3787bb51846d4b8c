"""What the shipped configuration of nginx passes on, refuses and adds; with a real nginx and a real service."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from service.api.errors import problem_type, status_of
from service.api.openapi import problem_classes
from service.settings import Settings
from tests.api.problems import assert_problem
from tests.conftest import RunningService, Serve, encoded, multipart
from tests.docs.browser import Browser, find_chromium
from tests.docs.test_documented import routes
from tests.gateway.conftest import Put
from tests.gateway.nginx import DEPLOY, Gateway, replaced, uncommented

SMALL = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8, "out_indices": [0]}
CONF = (DEPLOY / "nginx.conf").read_text()
MAX_BODY_BYTES = Settings.model_fields["max_body_bytes"].default
PROBLEM_KEYS = ["type", "title", "status", "detail", "request_id"]


def ask(http: httpx.Client, photo: bytes, **headers: str) -> httpx.Response:
    return http.post("/features", **multipart(SMALL, photo), headers=headers)


# --- what passes --------------------------------------------------------------------------------


def test_features_are_the_same_through_the_gateway(
    gateway: Gateway, http: httpx.Client, photo: bytes
) -> None:
    through, direct = (ask(client, photo, accept="application/x-npz") for client in (gateway.http, http))
    assert through.status_code == 200
    assert through.headers["etag"] == direct.headers["etag"]
    again = ask(
        gateway.http, photo, **{"accept": "application/x-npz", "if-none-match": through.headers["etag"]}
    )
    assert again.status_code == 304
    for name in ("content-type", "x-model-id", "content-length"):
        assert through.headers[name] == direct.headers[name]


def test_errors_of_the_service_pass_as_they_are(gateway: Gateway) -> None:
    reply = gateway.http.post("/features", **multipart({"type": "ResNet", "depth": 51}, b"x"))
    body = assert_problem(reply, 422, "invalid-config")
    assert body["errors"][0]["pointer"] == "#/backbone/depth"


def test_probes_speak_for_the_gateway_and_for_its_replicas(put: Put, gateway: Gateway) -> None:
    assert [gateway.http.get(path).status_code for path in ("/healthz", "/readyz")] == [200, 200]
    alone = put([closed_port()]).http
    alive = alone.get("/healthz", headers={"x-request-id": "mine"})
    assert (alive.json(), alive.headers["x-request-id"]) == ({"status": "ok"}, "mine")
    assert_problem(alone.get("/readyz"), 502, "about:blank")


# What is not named here is not passed on; a new route of the service has to be decided about.
PASSED = {
    ("POST", "/features"),
    ("POST", "/backbones/inspect"),
    ("GET", "/backbones"),
    ("GET", "/backbones/{type}"),
    ("GET", "/configs"),
    ("GET", "/configs/{name}"),
    ("GET", "/models"),
    ("GET", "/version"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
}
PROBES = {("GET", "/healthz"), ("GET", "/readyz")}


def test_only_routes_for_clients_are_passed_on(put: Put) -> None:
    gateway = put()
    asked = [*sorted(routes() - PROBES), ("PUT", "/configs"), ("DELETE", "/version"), ("GET", "/nothing")]
    refused = {
        route: reply.status_code
        for route in asked
        if (reply := gateway.http.request(*route)).status_code in (403, 404) and route not in PASSED
    }
    passed = {route for route, entry in zip(asked, gateway.log(), strict=True) if entry["replicas"]}
    assert passed == PASSED
    assert set(refused) == set(asked) - PASSED
    assert refused["POST", "/models"] == refused["DELETE", "/models/{id}"] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/metrics/",
        "//metrics",
        "/./metrics",
        "/%6detrics",
        "/metrics?x",
        "/docs/../metrics",
        "/docs/%2e%2e/metrics",
    ],
)
def test_metrics_are_not_seen_from_outside(gateway: Gateway, path: str) -> None:
    answer = gateway.exchange(f"GET {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"backbone_" not in answer


# --- request ids --------------------------------------------------------------------------------


def test_a_well_formed_request_id_is_kept_and_another_is_made(put: Put, photo: bytes) -> None:
    gateway = put()
    kept = ask(gateway.http, photo, **{"x-request-id": "my-id_1.2"}).headers["x-request-id"]
    made = [
        gateway.http.get("/version", headers={"x-request-id": given}).headers["x-request-id"]
        for given in ("", "no spaces", "x" * 129, '"}{"')
    ]
    refused = gateway.http.get("/metrics", headers={"x-request-id": "of-a-refusal"})
    assert assert_problem(refused, 404)["request_id"] == "of-a-refusal"
    assert kept == "my-id_1.2"
    assert all(re.fullmatch("[0-9a-f]{32}", request_id) for request_id in made)
    assert [entry["request_id"] for entry in gateway.log()] == [kept, *made, "of-a-refusal"]


def test_the_log_has_neither_key_nor_query_nor_payload(put: Put, photo: bytes) -> None:
    gateway = put([closed_port()])
    headers = {"authorization": "Bearer s3cret-key", "x-api-key": "s3cret-too", "content-type": "image/png"}
    for body in (b"s3cret-image", b"s3cret-image" * 2_000_000):
        gateway.http.post("/features?backbone=s3cret-config", content=body, headers=headers)
    log = gateway.log()
    assert [(entry["method"], entry["path"], entry["status"]) for entry in log] == [
        ("POST", "/features", "502"),
        ("POST", "/features", "413"),
    ]
    assert "s3cret" not in json.dumps(log) + gateway.complaints


def test_a_path_of_any_bytes_leaves_the_log_json(put: Put) -> None:
    gateway = put()
    gateway.exchange(b"GET /\x80\xff\xc3( HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n")
    assert [entry["path"] for entry in gateway.log()] == ["(not ASCII)"]


# --- limits -------------------------------------------------------------------------------------


def chunks(count_bytes: int) -> Iterator[bytes]:
    for start in range(0, count_bytes, 65_536):
        yield bytes(min(65_536, count_bytes - start))


def test_the_limit_on_bodies_is_the_services() -> None:
    assert f"client_max_body_size {MAX_BODY_BYTES};" in CONF
    assert (
        f'413 "the body exceeds {MAX_BODY_BYTES:,} bytes";' in (DEPLOY / "gateway/problems.conf").read_text()
    )


@pytest.mark.parametrize("is_chunked", [False, True], ids=["with a length", "chunked"])
def test_a_body_over_the_limit_is_413_and_one_at_it_passes(gateway: Gateway, is_chunked: bool) -> None:
    def post(count_bytes: int) -> httpx.Response:
        body = chunks(count_bytes) if is_chunked else bytes(count_bytes)
        return gateway.http.post(
            "/features?backbone=resnet50", content=body, headers={"content-type": "image/png"}
        )

    assert_problem(post(MAX_BODY_BYTES), 415, "unsupported-media")
    refused = assert_problem(post(MAX_BODY_BYTES + 1), 413, "too-large")
    assert refused["detail"] == f"the body exceeds {MAX_BODY_BYTES:,} bytes"
    assert list(refused) == PROBLEM_KEYS


def test_what_the_gateway_refuses_has_the_types_and_titles_of_the_service() -> None:
    told = (DEPLOY / "gateway/problems.conf").read_text()
    types = dict(re.findall(r"^    (\d+) (/problems/[a-z-]+);", told, re.MULTILINE))
    known = {problem_type(error): error for error in problem_classes()}
    assert len(types) >= 8
    for status, kind in types.items():
        assert str(status_of(known[kind])) == status
        assert f'{status} "{known[kind].title}";' in told


def test_who_asks_too_often_gets_429_and_nobody_else_does(put: Put) -> None:
    gateway = put(
        limits=replaced(("500r/s", "1r/m")),
        admission=replaced((" burst=1000 nodelay", "")),
        clients=replaced(('#"~^the-key-of-alice$" "alice"', '"~^a$" "alice"; "~^b$" "bob"')),
    )
    asked = [
        {},
        {"authorization": "Bearer a"},
        {"x-api-key": "a"},
        {"authorization": "bearer b"},
        {"x-api-key": "A"},
    ]
    replies = [gateway.http.get("/version", headers=headers) for headers in asked]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 200, 429]
    assert_problem(replies[-1], 429, "quota-exceeded")
    assert gateway.http.get("/healthz").status_code == 200
    assert [entry["name"] for entry in gateway.log()] == ["anonymous", "alice", "alice", "bob", "anonymous"]


def test_keys_at_the_gateway_let_in_who_has_one(put: Put) -> None:
    known = uncommented('"~^the-key-of-alice$"')
    closed = replaced(('default "anonymous"', 'default ""'))
    http = put(clients=lambda text: closed(known(text))).http
    assert_problem(http.get("/version"), 401, "unauthenticated")
    assert http.get("/version").headers["www-authenticate"] == "Bearer"
    for wrong in ("the-key-of-alic", "the-key-of-alice2", "THE-KEY-OF-ALICE", "alice", "~.*"):
        assert http.get("/version", headers={"authorization": f"Bearer {wrong}"}).status_code in (401, 403)
    assert_problem(http.get("/version", headers={"x-api-key": "wrong"}), 403, "forbidden")
    assert http.get("/version", headers={"authorization": "Bearer the-key-of-alice"}).status_code == 200
    assert http.get("/healthz").status_code == 200


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def test_without_a_replica_the_answer_is_502(put: Put, photo: bytes) -> None:
    gateway = put([closed_port(), closed_port()])
    reply = ask(gateway.http, photo)
    assert list(assert_problem(reply, 502, "about:blank")) == PROBLEM_KEYS
    assert int(reply.headers["retry-after"]) >= 1


# --- large and slow -----------------------------------------------------------------------------


def test_a_large_reply_is_read_slowly_without_going_to_disk(put: Put) -> None:
    gateway = put(nginx=replaced(("error_log stderr crit", "error_log stderr warn")))
    image = encoded(np.zeros((1024, 1024, 3), np.uint8))
    wide = {**SMALL, "base_channels": 16}
    request = {
        "data": {"backbone": json.dumps(wide), "preprocess": '{"mode":"native"}'},
        "files": [("image", image)] * 12,
    }
    with gateway.http.stream(
        "POST", "/features", headers={"accept": "application/x-npy"}, **request
    ) as reply:
        pieces = reply.iter_raw(65_536)
        read = len(next(pieces))
        # Another request is through while most of this one waits.
        assert gateway.http.get("/version").status_code == 200
        read += sum(map(len, pieces))
    assert reply.status_code == 200
    assert read == int(reply.headers["content-length"]) > 50_000_000
    gateway.stop()
    assert "temporary file" not in gateway.complaints


def head_of(body: bytes) -> bytes:
    return (
        b"POST /features?backbone=resnet50 HTTP/1.1\r\nHost: gateway\r\nContent-Type: image/png\r\n"
        b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    )


def test_a_slow_body_reaches_the_service_only_when_it_is_whole(
    gateway: Gateway, service: RunningService
) -> None:
    body = b"no image"
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as slow:
        slow.sendall(head_of(body) + body[:-1])
        assert gateway.http.get("/version").status_code == 200
        assert "backbone_in_flight_requests 1.0" in service.http.get("/metrics").text  # this one
        slow.sendall(body[-1:])
        answer = b"".join(iter(lambda: slow.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 415 ")
    assert b"/problems/unsupported-media" in answer


@pytest.mark.parametrize(
    "sent", [head_of(b"xx") + b"x", b"GET /version HTTP/1.1\r\nHost: ga"], ids=["body", "header"]
)
def test_who_stops_sending_is_let_go_of(put: Put, sent: bytes) -> None:
    gateway = put(
        nginx=replaced(
            ("client_body_timeout 10s", "client_body_timeout 50ms"),
            ("client_header_timeout 10s", "client_header_timeout 50ms"),
        )
    )
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=60) as slow:
        slow.sendall(sent)
        with pytest.raises(ConnectionResetError):
            slow.recv(1)
    [entry] = gateway.log()
    assert entry["status"] == "408"
    assert entry["replicas"] == ""


# --- hostile ------------------------------------------------------------------------------------

INNER = b"GET /metrics HTTP/1.1\r\nHost: gateway\r\n\r\n"
POST = b"POST /features HTTP/1.1\r\nHost: gateway\r\n"
SMUGGLED = {
    "length and chunks": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + INNER,
    "chunks and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 45\r\n\r\n0\r\n\r\n" + INNER,
    "two lengths": POST + b"Content-Length: 0\r\nContent-Length: 41\r\n\r\n" + INNER,
    "a list of lengths": POST + b"Content-Length: 0, 41\r\n\r\n" + INNER,
    "a signed length": POST + b"Content-Length: +41\r\n\r\n" + INNER,
    "a huge length": POST + b"Content-Length: 18446744073709551617\r\n\r\n" + INNER,
    "two codings": POST
    + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n"
    + INNER,
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + INNER,
    "a coding after another": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + INNER,
    "a space before the colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + INNER,
    "a bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n\r\n" + INNER,
    "a huge chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n\r\n" + INNER,
    "a nul": POST + b"X-A: a\x00b\r\n\r\n" + INNER,
    "no host": b"POST /features HTTP/1.1\r\n\r\n" + INNER,
    "a bad host": b"POST /features HTTP/1.1\r\nHost: a/../b\r\n\r\n" + INNER,
    "two hosts": POST + b"Host: other\r\n\r\n" + INNER,
    "no version": b"POST /features HTTP/9.9\r\nHost: gateway\r\n\r\n" + INNER,
    "no request": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + INNER,
    "a long line": b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nHost: gateway\r\n\r\n" + INNER,
    "a long header": POST + b"X-A: " + b"a" * 40_000 + b"\r\n\r\n" + INNER,
    "a tunnel": b"CONNECT gateway:443 HTTP/1.1\r\nHost: gateway:443\r\n\r\n" + INNER,
    "a trace": b"TRACE /version HTTP/1.1\r\nHost: gateway\r\n\r\n" + INNER,
}


@pytest.mark.parametrize("name", SMUGGLED)
def test_what_parsers_may_disagree_about_gets_no_second_request_through(gateway: Gateway, name: str) -> None:
    answer = gateway.exchange(SMUGGLED[name])
    statuses = re.findall(rb"^HTTP/1\.1 (\d+) ", answer, re.MULTILINE)
    assert len(statuses) >= 1
    assert set(statuses) <= {b"400", b"404", b"405", b"413", b"414", b"415", b"422", b"431", b"501", b"505"}
    assert b"backbone_" not in answer
    assert answer.count(b"application/problem+json") == len(statuses)
    for body in re.findall(rb"^\{.*\}$", answer, re.MULTILINE):
        assert json.loads(body)["status"] in map(int, statuses)
    assert gateway.http.get("/version").status_code == 200


def test_a_header_with_an_underscore_is_no_other_spelling(gateway: Gateway) -> None:
    page = gateway.http.get("/docs", headers={"X_Forwarded_Prefix": "/evil", "X_Request_ID": "evil"})
    assert "/evil" not in page.text
    assert page.headers["x-request-id"] != "evil"


def test_forwarded_headers_of_clients_are_dropped(gateway: Gateway) -> None:
    spoofed = [
        ("X-Forwarded-Prefix", "/evil"),
        ("X-Forwarded-Prefix", "/evil2"),
        ("Forwarded", "for=1.1.1.1"),
    ]
    assert "/evil" not in gateway.http.get("/docs", headers=spoofed).text
    assert "servers" not in gateway.http.get("/openapi.json", headers=spoofed).json()


def test_a_client_cannot_leave_its_quota_by_naming_another_address(put: Put, serve: Serve) -> None:
    limited = serve(requests_per_minute=2)
    http = put([int(limited.url.rpartition(":")[2])]).http
    spoofed = [{}, {"X-Forwarded-For": "1.1.1.1"}, {"X-Forwarded-For": "2.2.2.2"}]
    assert [http.get("/configs", headers=headers).status_code for headers in spoofed] == [200, 200, 429]


# --- below a prefix, and over TLS ---------------------------------------------------------------

SELF_SIGNED = (
    "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    " -subj /CN=localhost -addext subjectAltName=DNS:localhost"
)
BELOW_VISION = uncommented("if", "    ", "}")


def test_an_image_is_tried_out_on_the_page_below_a_prefix(put: Put, photo: bytes, tmp_path: Path) -> None:
    command = find_chromium()
    if command is None:
        pytest.skip("no Chromium is installed")
    gateway = put(prefix=BELOW_VISION)
    (tmp_path / "photo.jpg").write_bytes(photo)
    operation = "#operations-features-post_features"
    with Browser(command, tmp_path / "profile") as browser:
        browser.open(f"{gateway.url}/vision/docs#/features/post_features")
        browser.click(f"{operation} .try-out__btn")
        browser.choose_file(f"{operation} input[type=file]", tmp_path / "photo.jpg")
        browser.click(f"{operation} .execute")
        answer = browser.text(f"{operation} .live-responses-table tbody .response-col_status")
        complaints, requested = browser.complaints(), browser.requested()
    assert answer.split()[0] == "200"
    assert complaints == []
    web = [url for url in requested if url.startswith("http")]
    assert f"{gateway.url}/vision/features" in web
    assert all(url.startswith(f"{gateway.url}/vision/") for url in web)


def test_below_a_prefix_all_is_as_without_it(put: Put, photo: bytes) -> None:
    http = put(prefix=BELOW_VISION).http
    assert http.post("/vision/features", **multipart(SMALL, photo)).status_code == 200
    config = http.get("/vision/configs").json()["configs"][-1]["href"]
    assert config.startswith("/vision/configs/")
    assert http.get(config).status_code == 200
    assert http.get("/configs").json()["configs"][-1]["href"].startswith("/configs/")
    assert_problem(http.get("/vision/metrics"), 404)
    assert_problem(http.post("/vision/models"), 403)
    assert_problem(http.get("/visions/docs"), 404)
    for path in ("gateway/problem", "/gateway/problem", "%2fgateway/problem", "%2f%2fgateway/problem"):
        assert_problem(http.get(f"/vision/{path}"), 404)
    assert http.get("/vision/../version").status_code == 200


def test_tls_is_there_once_its_lines_are_taken_in(put: Put, tmp_path: Path, photo: bytes) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    made = f"openssl {SELF_SIGNED} -keyout {key} -out {certificate}".split()
    subprocess.run(made, check=True, capture_output=True)
    lines = uncommented("listen", "ssl")
    gateway = put(listen=lambda text: lines(text).replace("tls/tls.", f"{tmp_path}/tls."))
    with gateway.over_tls(certificate) as https:
        assert ask(https, photo).status_code == 200
    plain_to_tls = httpx.get(f"http://127.0.0.1:{gateway.tls_port}/version", trust_env=False)
    assert_problem(plain_to_tls, 400)
