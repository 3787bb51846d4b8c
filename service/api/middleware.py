"""Around every request: its id, metrics, and the access log."""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import MutableMapping
from typing import Any

from prometheus_client import Counter, Histogram
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.headers import header
from service.metrics import Metrics

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
access_log = logging.getLogger("service.access")


class ServiceMiddleware:
    """Pure ASGI, outermost."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics
        self._known_counters: dict[tuple[str, int], tuple[Counter, Histogram]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = _Exchange(scope, send)
        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, exchange.send)
        except Exception:
            exchange.status = 500  # answered further out
            raise
        finally:
            self._metrics.in_flight.dec()
            self._note(scope, exchange.status, time.perf_counter() - started)

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
    """One reply, watched."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.status = 499  # what stays when the client left before an answer
        self._send = send
        self.request_id = _request_id(scope)
        scope["request_id"] = self.request_id

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


def _request_id(scope: Scope) -> str:
    """The client's id if it is well-formed, else a new one."""
    given = header(scope, b"x-request-id")
    return given.decode() if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
