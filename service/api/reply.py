"""What the routes answer with: facts as JSON, and bodies that are sent as they lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

# What the server's transport takes before it makes a sender wait.
TRANSPORT_BYTES = 64 * 1024


def json_reply(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Plain data, dataclasses included, as JSON."""
    return Response(orjson.dumps(body), status, headers, "application/json")


class ChunkedReply(Response):
    """A body in pieces of a length that is known, sent by the request's own task.

    Starlette's streaming response watches for a client that leaves in a task group, which costs more than a small
    request's whole way through HTTP; here the server says so itself, for it stops taking what is sent.

    Args:
        sent: called once it has left, or its client has.
    """

    def __init__(
        self,
        chunks: Sequence[bytes | memoryview],
        headers: Mapping[str, str],
        media_type: str,
        status_code: int = 200,
        *,
        sent: Callable[[], None],
    ) -> None:
        self.status_code = status_code
        self.media_type = media_type
        self.background = None
        self._chunks = chunks
        self._sent = sent
        self._size = sum(map(len, chunks))
        self.init_headers({"Content-Length": str(self._size), **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it all; done when the server has room again, so that a large body is in flight until it has left."""
        del scope, receive  # ASGI hands them to every reply
        try:
            await self._send(send)
        finally:
            self._sent()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if self._size <= TRANSPORT_BYTES:
            await send({"type": "http.response.body", "body": b"".join(self._chunks)})
            return
        for chunk in self._chunks:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
        await send({"type": "http.response.body", "body": b""})
