"""Around every request: its ids, metrics, the access log, and its span where spans are recorded."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from functools import cache
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.entrance import PROBES
from service.api.errors import reason_of
from service.api.openapi import problem_classes
from service.context import CURRENT, RequestContext, parse_traceparent, span_below
from service.logs import ACCESS
from service.metrics import MEDIA_TYPES, METHODS, OTHER, UNMATCHED, Metrics
from service.spans import RequestSpan, Spans

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
GIVEN = (b"x-request-id", b"traceparent", b"tracestate")
LEFT = 499  # the client left before an answer
access_log = logging.getLogger(ACCESS)
log = logging.getLogger("service.crash")


class ServiceMiddleware:
    """Pure ASGI, outermost.

    Args:
        spans: where spans go; None where nobody wants them.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics, spans: Spans | None = None) -> None:
        self._app = app
        self._metrics = metrics
        self._spans = spans
        self._counters: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._sizes: dict[str, Histogram] = {}
        for problem in problem_classes():
            metrics.rejected.labels(reason_of(problem))  # shown from the start, so that rates begin at 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context, span = self._begun(scope)
        CURRENT.set(context)
        scope["request_id"] = context.request_id
        exchange = _Exchange(context, receive, send)
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            exchange.status = 500  # answered further out
            log.error("a request crashed", exc_info=error, extra={"route": _route(scope)})
            raise
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, exchange)
            if span is not None:
                _end(span, scope, exchange)

    def _begun(self, scope: Scope) -> tuple[RequestContext, RequestSpan | None]:
        """Ids, the client's where they are well-formed, and the span where spans are recorded."""
        given: dict[bytes, list[bytes]] = {name: [] for name in GIVEN}
        for name, value in scope["headers"]:
            if name in given:
                given[name].append(value)
        request_id = _request_id(given[b"x-request-id"])
        parent = parse_traceparent(given[b"traceparent"])
        if self._spans is None or scope["path"] in PROBES:
            return RequestContext(request_id, span_below(parent)), None
        span = self._spans.begin(_method(scope), parent, given[b"tracestate"])
        return RequestContext(request_id, span.ids, span), span

    def _note(self, scope: Scope, exchange: _Exchange) -> None:
        """Count and log a request that is over."""
        seconds = exchange.seconds()
        method, route, status = _method(scope), _route(scope), exchange.status
        count, duration = self._counters_of(method, route, status)
        count.inc()
        duration.observe(seconds)
        self._size_of(exchange.media_type).observe(exchange.bytes_out)
        problem: str | None = scope.get("problem")
        if problem is not None:
            self._metrics.rejected.labels(problem).inc()
        level = logging.DEBUG if route in PROBES else logging.INFO
        if access_log.isEnabledFor(level):
            facts = {
                "method": method,
                "route": route,
                "status": status,
                "duration_ms": round(seconds * 1000, 3),
                "bytes_in": exchange.bytes_in,
                "bytes_out": exchange.bytes_out,
                "client": scope.get("client_name"),
                "model": exchange.model,
                "problem": problem,
            }
            access_log.log(level, "%s %s %d %.1fms", method, route, status, seconds * 1000, extra=facts)

    def _counters_of(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        """The two of a kind of request; they are found once, for looking them up takes longer than counting."""
        known = self._counters.get((method, route, status))
        if known is None:
            metrics = self._metrics
            known = (
                metrics.requests.labels(method, route, str(status)),
                metrics.request_seconds.labels(route),
            )
            self._counters[method, route, status] = known
        return known

    def _size_of(self, media_type: str) -> Histogram:
        known = self._sizes.get(media_type)
        if known is None:
            known = self._metrics.reply_bytes.labels(media_type)
            self._sizes[media_type] = known
        return known


class _Exchange:
    """One request and its reply, watched."""

    __slots__ = (
        "_context",
        "_receive",
        "_send",
        "_started",
        "bytes_in",
        "bytes_out",
        "media_type",
        "model",
        "status",
    )

    def __init__(self, context: RequestContext, receive: Receive, send: Send) -> None:
        self._context = context
        self._receive = receive
        self._send = send
        self._started = time.perf_counter()
        self.status = LEFT
        self.bytes_in = self.bytes_out = 0
        self.media_type = OTHER
        self.model: str | None = None

    def seconds(self) -> float:
        """How long it has taken."""
        return time.perf_counter() - self._started

    async def receive(self) -> Message:
        """The next message from the client, counted."""
        message = await self._receive()
        self.bytes_in += len(message.get("body", b""))
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """The next message to the client; adds the headers that every reply has."""
        if message["type"] == "http.response.start":
            self._begin(message)
        else:
            self.bytes_out += len(message.get("body", b""))
        await self._send(message)

    def _begin(self, message: MutableMapping[str, Any]) -> None:
        self.status = message["status"]
        headers = list(message.get("headers", ()))
        said = dict(headers)
        media_type = said.get(b"content-type", b"").partition(b";")[0].decode("latin-1")
        self.media_type = media_type if media_type in MEDIA_TYPES else OTHER
        model = said.get(b"x-model-id")
        self.model = None if model is None else model.decode("latin-1")
        headers += (
            (b"x-request-id", self._context.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"traceresponse", self._context.trace.traceparent().encode()),
        )
        if b"server-timing" not in said:
            headers.append((b"server-timing", b"total;dur=%.2f" % (self.seconds() * 1000)))
        message["headers"] = headers


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in METHODS else OTHER


def _route(scope: Scope) -> str:
    """The template of the route: `/backbones/{type}`, never what the client put there."""
    return _template(getattr(scope.get("route"), "path", UNMATCHED))


@cache
def _template(path: str) -> str:
    """A route's path without the converters of its parameters."""
    return re.sub(r":\w+}", "}", path)


def _request_id(given: list[bytes]) -> str:
    """The client's id if it is well-formed, else a new one."""
    if given and REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    return secrets.token_hex(8)


def _end(span: RequestSpan, scope: Scope, exchange: _Exchange) -> None:
    route = _route(scope)
    attributes: dict[str, str | int] = {
        "http.route": route,
        "http.response.status_code": exchange.status,
        "backbone.request_id": scope["request_id"],
    }
    if exchange.model is not None:
        attributes["backbone.model.id"] = exchange.model
    span.end(f"{_method(scope)} {route}", attributes, is_failed=exchange.status >= 500)
