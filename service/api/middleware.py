"""Around every request: its id, the limit on its body counted as it arrives, metrics, and the access log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_response
from service.errors import Draining, ServiceError, TooLarge, UnsupportedMedia
from service.metrics import Metrics

PROBES = ("/healthz", "/readyz", "/metrics")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
access_log = logging.getLogger("service.access")


class ServiceMiddleware:
    """Pure ASGI, outermost."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, metrics: Metrics) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics
        self._known_counters: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._max_body_bytes)
        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._answer(exchange)
        except Exception:
            exchange.status = 500  # answered further out
            raise
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, exchange.status, time.perf_counter() - started)

    async def _answer(self, exchange: _Exchange) -> None:
        refusal = exchange.refused_unread()
        if refusal is not None:
            await problem_response(refusal, exchange.request_id)(
                exchange.scope, exchange.receive, exchange.send
            )
            return
        await self._app(exchange.scope, exchange.receive, exchange.send)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        count, duration = self._counters(route, status)
        count.inc()
        duration.observe(seconds)
        access_log.info(
            "%s %s %d %.1fms",
            scope["method"],
            route,
            status,
            seconds * 1000,
            extra={"request_id": scope["request_id"]},
        )

    def _counters(self, route: str, status: int) -> tuple[Counter, Histogram]:
        """The two of a route and a status; they are found once, for looking them up takes longer than counting."""
        known = self._known_counters.get((route, status))
        if known is None:
            metrics = self._metrics
            known = metrics.requests.labels(route, str(status)), metrics.request_seconds.labels(route)
            self._known_counters[route, status] = known
        return known


class _Exchange:
    """One request and its reply, watched."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, max_body_bytes: int) -> None:
        self.scope = scope
        self.status = 499  # what stays when the client left before an answer
        self._receive = receive
        self._send = send
        self._max_body_bytes = max_body_bytes
        self._seen_bytes = 0
        self.request_id = _request_id(scope)
        scope["request_id"] = self.request_id

    def refused_unread(self) -> ServiceError | None:
        """What the headers alone, or a shutdown under way, rule out."""
        if self.scope["app"].state.startup.refuses and self.scope["path"] not in PROBES:
            return Draining("the service is shutting down")
        declared = _header(self.scope, b"content-length")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            return self.too_large()
        if _header(self.scope, b"content-encoding") not in (b"", b"identity"):
            return UnsupportedMedia("compressed request bodies are not served; send the body as it is")
        return None

    def too_large(self) -> TooLarge:
        """The refusal of a body over the limit."""
        return TooLarge(f"the body exceeds {self._max_body_bytes:,} bytes")

    async def receive(self) -> Message:
        """The next message from the client; counts the bytes of the body.

        Raises:
            TooLarge: more came than the limit, whatever Content-Length said.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message.get("body", b""))
            if self._seen_bytes > self._max_body_bytes:
                raise self.too_large()
        return message

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """The next message to the client; adds the headers that every reply has."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [
                *message.get("headers", []),
                (b"x-request-id", self.request_id.encode()),
                (b"x-content-type-options", b"nosniff"),
            ]
        await self._send(message)


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


def _request_id(scope: Scope) -> str:
    """The client's id if it is well-formed, else a new one."""
    given = _header(scope, b"x-request-id")
    return given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
