"""Around every request: compresses the replies that are text, as `Accept-Encoding` asks; says which coding that is.

The replies of `POST /features` come compressed already, by the thread that encoded them.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import problem_response
from service.errors import NotAcceptable
from service.protocol.coding import AcceptedCoding, accepted_coding, compress

TEXT_TYPES = (
    b"application/json",
    b"application/problem+json",
    b"text/html",
    b"text/plain",
)
# Below it, compressing takes less time than handing the body to another thread.
QUICK_BYTES = 64 * 1024
_SCOPE_KEY = "accepted_coding"


def coding_of(request: Request) -> AcceptedCoding:
    """What the client of this request reads."""
    coding: AcceptedCoding = request.scope[_SCOPE_KEY]
    return coding


class CompressionMiddleware:
    """Pure ASGI. Bodies that come in pieces (the files of `GET /docs`) are left as they are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            coding = accepted_coding(_accept_encoding(scope))
        except NotAcceptable as error:
            await problem_response(error, scope["request_id"])(scope, receive, send)
            return
        scope[_SCOPE_KEY] = coding
        await self._app(scope, receive, _Sender(coding, send))


class _Sender:
    """`send` of one reply; a head is held back until it is known whether its body is worth compressing."""

    def __init__(self, coding: AcceptedCoding, send: Send) -> None:
        self._coding = coding
        self._send = send
        self._head: MutableMapping[str, Any] | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and _is_text(message):
            self._head = message
            return
        if self._head is not None:
            head, self._head = self._head, None
            head["headers"] = [*head["headers"], (b"vary", b"Accept-Encoding")]
            if self._coding.pays(len(message.get("body", b""))) and not message.get("more_body", False):
                await self._compress(head, message)
            await self._send(head)
        await self._send(message)

    async def _compress(self, head: MutableMapping[str, Any], message: Message) -> None:
        body, coding = message["body"], self._coding.name
        if len(body) <= QUICK_BYTES:
            packed = b"".join(compress(coding, (body,)))
        else:
            packed = b"".join(await asyncio.to_thread(compress, coding, (body,)))
        message["body"] = packed
        kept = [(name, value) for name, value in head["headers"] if name != b"content-length"]
        length, encoding = str(len(packed)).encode(), coding.encode()
        head["headers"] = [*kept, (b"content-length", length), (b"content-encoding", encoding)]


def _accept_encoding(scope: Scope) -> str | None:
    """The header; several are one list (RFC 9110, section 5.3)."""
    given = [value for name, value in scope["headers"] if name == b"accept-encoding"]
    return b",".join(given).decode("latin-1") if given else None


def _is_text(message: Message) -> bool:
    """Whether the reply is of a type that compresses, and does not say already how it is encoded."""
    headers = dict(message.get("headers", ()))
    media_type = headers.get(b"content-type", b"").partition(b";")[0]
    return media_type in TEXT_TYPES and b"vary" not in headers
