"""What a request may bring: bytes of its body, counted as they arrive whatever `Content-Length` says, and in time.

What comes before the body is bounded in `service.api.connections`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_response
from service.api.headers import header
from service.errors import ServiceBusy, ServiceError, SlowRequest, TooLarge, UnsupportedMedia
from service.metrics import Metrics
from service.settings import Settings


@dataclass(frozen=True)
class BodyLimits:
    """Of one body: bytes, and bytes a second in each window of so many seconds. Of all together: bytes."""

    max_bytes: int
    timeout_s: float
    min_rate: int
    budget_bytes: int

    @classmethod
    def of(cls, settings: Settings) -> BodyLimits:
        """The limits of settings."""
        return cls(settings.max_body_bytes, settings.body_timeout, settings.min_rate, settings.body_budget)


@dataclass
class _Held:
    """The bytes of all bodies whose requests are under way."""

    size_bytes: int = 0


class LimitsMiddleware:
    """Pure ASGI. Refuses by the headers alone where they are enough, else while the body arrives."""

    def __init__(self, app: ASGIApp, *, limits: BodyLimits, metrics: Metrics) -> None:
        self._app = app
        self._limits = limits
        self._held = _Held()
        metrics.body_bytes.set_function(lambda: self._held.size_bytes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refused_unread(scope)
        if refusal is not None:
            await problem_response(refusal, scope["request_id"])(scope, receive, send)
            return
        body = _Body(receive, self._limits, self._held)
        try:
            await self._app(scope, body, send)
        finally:
            body.release()

    def _refused_unread(self, scope: Scope) -> ServiceError | None:
        """What the headers alone rule out."""
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._limits.max_bytes:
            return _too_large(self._limits)
        if declared.isdigit() and int(declared) + self._held.size_bytes > self._limits.budget_bytes:
            return _busy(self._limits)
        if header(scope, b"content-encoding").lower() not in (b"", b"identity"):
            return UnsupportedMedia("compressed request bodies are not served; send the body as it is")
        return None


class _Body:
    """The `receive` of one request. One timer watches a whole body; none is started for its pieces."""

    def __init__(self, receive: Receive, limits: BodyLimits, held: _Held) -> None:
        self._receive = receive
        self._limits = limits
        self._held = held
        self._seen_bytes = self._bytes_before = 0
        self._is_whole = self._is_slow = False
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Task[object] | None = None

    async def __call__(self) -> Message:
        """The next message from the client.

        Raises:
            TooLarge: more came than the limit.
            ServiceBusy: all bodies together are more than theirs.
            SlowRequest: too little came in the time that it has.
        """
        if self._is_whole:
            return await self._receive()
        if self._timer is None:
            self._arm()
        message = await self._in_time()
        if message["type"] == "http.request":
            self._count(len(message.get("body", b"")))
        if not message.get("more_body", False):
            self._is_whole = True
            self._disarm()
        return message

    async def _in_time(self) -> Message:
        """The next message, unless the timer ends the waiting for it as `asyncio.timeout` would."""
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self._reader = task
        try:
            return await self._receive()
        except asyncio.CancelledError as error:
            if self._is_slow and task.uncancel() <= cancelled_before:
                raise _slow(self._limits) from error
            raise
        finally:
            self._reader = None

    def _count(self, size_bytes: int) -> None:
        self._seen_bytes += size_bytes
        self._held.size_bytes += size_bytes
        if self._seen_bytes > self._limits.max_bytes:
            raise _too_large(self._limits)
        if self._held.size_bytes > self._limits.budget_bytes:
            raise _busy(self._limits)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._limits.timeout_s, self._check)

    def _check(self) -> None:
        came_bytes = self._seen_bytes - self._bytes_before
        self._bytes_before = self._seen_bytes
        # Where nobody reads, the app is what is slow.
        if self._reader is None or came_bytes >= max(1, self._limits.min_rate * self._limits.timeout_s):
            self._arm()
        else:
            self._is_slow = True
            self._reader.cancel()

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def release(self) -> None:
        """The request is over, and its body with it."""
        self._disarm()
        self._held.size_bytes -= self._seen_bytes


def _too_large(limits: BodyLimits) -> TooLarge:
    return TooLarge(f"the body exceeds {limits.max_bytes:,} bytes")


def _busy(limits: BodyLimits) -> ServiceBusy:
    return ServiceBusy(f"the bodies of all requests exceed {limits.budget_bytes:,} bytes; ask again")


def _slow(limits: BodyLimits) -> SlowRequest:
    return SlowRequest(
        f"the body did not end in {limits.timeout_s:g} s, nor bring {limits.min_rate:,} bytes a second"
    )
