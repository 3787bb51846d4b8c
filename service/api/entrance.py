"""Who is let in: not beyond so many at once, not while the service is on its way out, and with a deadline."""

from __future__ import annotations

import asyncio
import re
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.access import note_route, route_path
from service.api.draining import Drain, draining
from service.api.errors import problem_response
from service.api.headers import header
from service.errors import InvalidHeader, QueueFull, ServiceError
from service.runtime.rates import DrainRate, retry_after
from service.runtime.threads import Deadline

PROBES = ("/healthz", "/readyz", "/metrics")
SECONDS = re.compile(rb"\d{1,9}(\.\d{1,9})?")
CLOSE = (b"connection", b"close")


class EntranceMiddleware:
    """Pure ASGI. Probes are let in whatever happens.

    Args:
        request_timeout_s: what a request may take; its own `X-Request-Timeout` can only shorten it.
        max_requests: requests in flight, from their headers to the end of their replies.
    """

    def __init__(self, app: ASGIApp, *, drain: Drain, request_timeout_s: float, max_requests: int) -> None:
        self._app = app
        self._drain = drain
        self._request_timeout_s = request_timeout_s
        self._max_requests = max_requests
        self._rate = DrainRate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        reply = _Reply(send, self._drain)
        is_probe = route_path(scope) in PROBES
        refusal = None if is_probe else self._refusal(scope)
        if refusal is not None:
            note_route(scope)
            await problem_response(refusal, scope["request_id"])(scope, receive, reply.send)
        elif is_probe:
            await self._app(scope, receive, reply.send)
        else:
            await self._serve(scope, receive, reply)

    def _refusal(self, scope: Scope) -> ServiceError | None:
        """Why a request is not let in; notes its deadline if it is."""
        in_flight = len(self._drain.in_flight)
        if self._drain.refusing:
            return draining()
        if in_flight >= self._max_requests:
            wait_s = retry_after(self._rate.seconds_for(in_flight), self._request_timeout_s)
            return QueueFull(f"{in_flight} requests are in flight, as many as may be", retry_after_s=wait_s)
        asked = header(scope, b"x-request-timeout")
        if asked and not SECONDS.fullmatch(asked):
            return InvalidHeader("X-Request-Timeout must be seconds, such as 2 or 0.5")
        seconds = min(float(asked), self._request_timeout_s) if asked else self._request_timeout_s
        scope["deadline"] = Deadline.after(seconds)
        return None

    async def _serve(self, scope: Scope, receive: Receive, reply: _Reply) -> None:
        in_flight = self._drain.in_flight
        task = asyncio.current_task()
        assert task is not None
        if not in_flight:
            self._rate.begin(time.monotonic())
        in_flight.add(task)
        try:
            await self._app(scope, receive, reply.send)
        except asyncio.CancelledError:
            if reply.has_begun or not self._drain.is_over:
                raise
            task.uncancel()
            await problem_response(draining(), scope["request_id"])(scope, receive, reply.send)
        finally:
            in_flight.discard(task)
            self._rate.note(1, time.monotonic())


class _Reply:
    """One reply on its way out; it closes its connection once the service is leaving."""

    __slots__ = ("_drain", "_send", "has_begun")

    def __init__(self, send: Send, drain: Drain) -> None:
        self._send = send
        self._drain = drain
        self.has_begun = False

    async def send(self, message: Message) -> None:
        """The next message to the client."""
        if message["type"] == "http.response.start":
            self.has_begun = True
            if self._drain.leaving:
                message["headers"] = [*message.get("headers", ()), CLOSE]
        await self._send(message)
