"""W3C trace context in and out, and spans at a collector: a real OTLP receiver on loopback."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from starlette.requests import Request
from starlette.routing import Route

from tests.api.test_concurrency import ask, held_device, wait_for_queue
from tests.conftest import Serve, encoded, multipart
from tests.processes import COMMAND, environment

RESNET18 = {"type": "ResNet", "depth": 18}
DOTS = encoded(np.zeros((20, 30, 3), np.uint8))
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
TRACERESPONSE = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-0[01]")


def trace_id(reply: httpx.Response) -> str:
    """The trace of a reply, which its problem names too."""
    found = TRACERESPONSE.fullmatch(reply.headers["traceresponse"])
    assert found
    assert reply.json()["trace_id"] == found[1]
    assert found[2] != PARENT
    return found[1]


# --- ids ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-00",
        f"00-{TRACE}-{PARENT}-ff",  # flags of later versions
        f"cc-{TRACE}-{PARENT}-01",  # a later version
        f"cc-{TRACE}-{PARENT}-01-what-comes-later",
    ],
)
def test_the_trace_of_the_caller_goes_on(http: httpx.Client, header: str) -> None:
    reply = http.get("/backbones/nothing", headers={"traceparent": header})
    assert trace_id(reply) == TRACE
    assert reply.headers["traceresponse"].endswith("-00")  # nobody records it here


@pytest.mark.parametrize(
    "header",
    [
        "",
        "what",
        f"00-{'0' * 32}-{PARENT}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"ff-{TRACE}-{PARENT}-01",
        f"00-{TRACE.upper()}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-01-more",  # version 00 has four parts
        f"cc-{TRACE}-{PARENT}-01more",
        f"00-{TRACE}-{PARENT}",
        f"00-{TRACE}-{PARENT}-1",
        f"0-{TRACE}-{PARENT}-01",
        f"00-{TRACE[:-1]}-{PARENT}-01",
        f"00-{TRACE}-{PARENT}-0x",
        f"00-{TRACE}-{PARENT}-01" * 1000,
    ],
)
def test_a_trace_that_is_not_valid_is_not_gone_on_with(http: httpx.Client, header: str) -> None:
    reply = http.get("/backbones/nothing", headers={"traceparent": header})
    assert trace_id(reply) != TRACE


def test_two_callers_are_none(http: httpx.Client) -> None:
    header = ("traceparent", f"00-{TRACE}-{PARENT}-01")
    assert trace_id(http.get("/backbones/nothing", headers=[header, header])) != TRACE


def test_every_request_without_a_caller_is_a_trace_of_its_own(http: httpx.Client) -> None:
    assert len({trace_id(http.get("/backbones/nothing")) for _ in range(5)}) == 5


@pytest.mark.parametrize("path", ["/healthz", "/backbones", "/no/such/route", "/docs"])
def test_every_reply_says_how_long_it_took(http: httpx.Client, path: str) -> None:
    assert re.fullmatch(r"total;dur=\d+\.\d\d", http.get(path).headers["server-timing"])


# --- spans --------------------------------------------------------------------------------------


class Collector:
    """Receives OTLP over HTTP."""

    def __init__(self) -> None:
        self.bodies: queue.Queue[bytes] = queue.Queue()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                collector.bodies.put(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def received(self) -> list[Span]:
        """The spans that have come."""
        requests = [ExportTraceServiceRequest.FromString(body) for body in list(self.bodies.queue)]
        return [
            span
            for request in requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def raw(self) -> bytes:
        return b"".join(self.bodies.queue)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    collector = Collector()
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def by_name(spans: list[Span]) -> dict[str, Span]:
    return {span.name: span for span in spans}


def attributes(span: Span) -> dict[str, str | int]:
    return {item.key: item.value.string_value or item.value.int_value for item in span.attributes}


def test_a_request_is_a_span_with_its_stages_below(serve: Serve, collector: Collector) -> None:
    service = serve(tracing=True)
    headers = {
        "traceparent": f"00-{TRACE}-{PARENT}-01",
        "tracestate": "rojo=1,congo=2",
        "X-Request-ID": "mine",
    }
    reply = service.http.post("/features", **multipart(RESNET18, DOTS), headers=headers)
    service.http.get("/healthz")
    service.stop()
    spans = by_name(collector.received())
    assert set(spans) == {"POST /features", "decode", "load", "queue", "forward", "encode", "batch"}
    request = spans.pop("POST /features")
    assert (request.trace_id.hex(), request.parent_span_id.hex()) == (TRACE, PARENT)
    assert request.trace_state == "rojo=1,congo=2"
    assert request.kind == Span.SPAN_KIND_SERVER
    assert reply.headers["traceresponse"] == f"00-{TRACE}-{request.span_id.hex()}-01"
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/features",
        "http.response.status_code": 200,
        "backbone.request_id": "mine",
        "backbone.model.id": reply.headers["x-model-id"],
    }
    for span in spans.values():
        assert (span.trace_id, span.parent_span_id) == (request.trace_id, request.span_id)
        assert request.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= request.end_time_unix_nano
    assert b"backbone-service" in collector.raw()


def test_requests_that_share_a_forward_pass_are_linked(serve: Serve, collector: Collector) -> None:
    service = serve(tracing=True)
    ask(service, RESNET18)
    service.engine.batcher.sizes.limit = lambda *_, **__: 16  # what is learned of them is tested elsewhere
    with ThreadPoolExecutor(3) as clients:
        with held_device(service) as inside:
            first = clients.submit(ask, service, RESNET18)
            assert inside.wait(60)
            others = [clients.submit(ask, service, RESNET18) for _ in range(2)]
            wait_for_queue(service, 2)
        replies = [future.result(60) for future in (first, *others)]
    service.stop()
    batches = [span for span in collector.received() if span.name == "batch"]
    [shared] = [span for span in batches if len(span.links) == 2]
    linked = {(link.trace_id.hex(), link.span_id.hex()) for link in shared.links}
    assert linked == {tuple(reply.headers["traceresponse"].split("-")[1:3]) for reply in replies[1:]}
    assert attributes(shared) == {"backbone.batch.images": 2, "backbone.batch.requests": 2}
    assert sorted(len(span.links) for span in batches) == [1, 1, 2]


def test_what_is_not_sampled_is_not_sent(serve: Serve, collector: Collector) -> None:
    service = serve(tracing=True)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
    reply = service.http.post("/features", **multipart(RESNET18, DOTS), headers=headers)
    service.stop()
    assert reply.headers["traceresponse"].startswith(f"00-{TRACE}-")
    assert collector.received() == []


def test_a_failure_is_a_failed_span_and_nothing_that_a_client_sent_is_in_any(
    serve: Serve, collector: Collector
) -> None:
    service = serve(tracing=True)

    def crash(_request: Request) -> None:
        raise RuntimeError("zebra")

    service.app.router.routes.insert(0, Route("/version", crash))  # in the place of one that there is
    service.http.get("/zebra?q=zebra")
    service.http.post("/features?backbone=zebra", content=DOTS, headers={"Content-Type": "image/png"})
    service.http.get(
        "/version?q=zebra", headers={"tracestate": "zebra", "baggage": "a=zebra", "Cookie": "zebra"}
    )
    service.stop()
    spans = by_name(collector.received())
    assert set(spans) == {"GET /version", "GET unmatched", "POST /features"}
    assert spans["GET /version"].status.code == Status.STATUS_CODE_ERROR
    assert spans["POST /features"].status.code == Status.STATUS_CODE_UNSET
    assert b"zebra" not in collector.raw()


@pytest.mark.parametrize("state", ["x" * 600, "no member", "a=1," * 200])
def test_a_trace_state_that_is_not_valid_is_left_out(serve: Serve, collector: Collector, state: str) -> None:
    service = serve(tracing=True)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": state}
    service.http.get("/configs", headers=headers)
    service.stop()
    [span] = collector.received()
    assert (span.trace_id.hex(), span.trace_state) == (TRACE, "")


def test_a_collector_that_is_away_costs_no_request(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    service = serve(tracing=True)
    assert service.http.get("/configs").status_code == 200
    service.stop()


def test_the_standard_variables_turn_it_off(
    serve: Serve, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    service = serve(tracing=True)
    assert service.http.get("/configs").status_code == 200
    service.stop()
    assert collector.received() == []


# --- without the extra --------------------------------------------------------------------------


def run(program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    asked = [sys.executable, "-c", program]
    return subprocess.run(
        asked, env=environment(**variables), capture_output=True, text=True, timeout=60, check=False
    )


def test_spans_without_the_extra_are_refused_at_start() -> None:
    missing = "import sys; sys.modules['opentelemetry.sdk'] = None; from service.cli import main; "
    done = run(missing + "sys.exit(main(['serve', '--tracing', '--port', '0']))")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install 'backbone-service[otel]'" in done.stderr


def test_without_the_setting_nothing_of_the_sdk_is_imported() -> None:
    program = "import sys; from service.api.app import create_app; from service.settings import Settings; "
    show = (
        "create_app(Settings()); print(sorted(m for m in sys.modules if m.startswith('opentelemetry.sdk')))"
    )
    done = run(
        program + show, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:9", FASTAPI_OTEL_AUTO_CONFIGURE="true"
    )
    assert done.stdout == "[]\n", done.stderr


def test_a_protocol_that_is_not_served_is_refused_at_start() -> None:
    asked = environment(BACKBONE_TRACING="1", OTEL_EXPORTER_OTLP_TRACES_PROTOCOL="grpc")
    done = subprocess.run(
        [COMMAND, "serve"], env=asked, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "only http/protobuf is served, not grpc" in done.stderr
