"""What a request may bring: bytes of its body, counted as they arrive whatever `Content-Length` says."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_response
from service.api.headers import header
from service.errors import ServiceError, TooLarge, UnsupportedMedia


class LimitsMiddleware:
    """Pure ASGI. Refuses by the headers alone where they are enough, else while the body arrives."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refused_unread(scope)
        if refusal is not None:
            await problem_response(refusal, scope["request_id"])(scope, receive, send)
            return
        await self._app(scope, _CountedBody(receive, self._max_body_bytes), send)

    def _refused_unread(self, scope: Scope) -> ServiceError | None:
        """What the headers alone rule out."""
        declared = header(scope, b"content-length")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            return _too_large(self._max_body_bytes)
        if header(scope, b"content-encoding") not in (b"", b"identity"):
            return UnsupportedMedia("compressed request bodies are not served; send the body as it is")
        return None


class _CountedBody:
    """The `receive` of one request."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._seen_bytes = 0

    async def __call__(self) -> Message:
        """The next message from the client.

        Raises:
            TooLarge: more came than the limit.
        """
        message = await self._receive()
        if message["type"] == "http.request":
            self._seen_bytes += len(message.get("body", b""))
            if self._seen_bytes > self._max_bytes:
                raise _too_large(self._max_bytes)
        return message


def _too_large(limit_bytes: int) -> TooLarge:
    return TooLarge(f"the body exceeds {limit_bytes:,} bytes")
