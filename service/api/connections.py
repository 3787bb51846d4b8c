"""One connection, bounded in time and bytes, over uvicorn's protocol.

Uvicorn with httptools has no limit on the head of a request, on the time that it takes, on requests sent ahead, or on
the time that a client takes to read its reply, and it reads a refused body to its end. What is bounded here is what an
app cannot see; the body that an app reads is bounded in `service.api.limits`.
"""

from __future__ import annotations

import asyncio
import enum
import logging
import secrets
import socket
import struct
import time
from collections.abc import Sequence
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.api.errors import problem_response, reason_of
from service.context import CURRENT, RequestContext, span_below
from service.errors import (
    HeadersTooLarge,
    MalformedRequest,
    ServiceBusy,
    ServiceError,
    SlowRequest,
    TargetTooLong,
)
from service.metrics import OTHER, UNMATCHED, Metrics
from service.settings import Settings

VERSIONS = ("1.0", "1.1")
MAX_TARGET_BYTES = 65_535  # httptools keeps places in it as 16 bits
MAX_HEADER_BYTES = 64 * 1024
MAX_HEADERS = 128
# Target and headers as they come, before the parser has made anything of them; the rest is method and version.
MAX_HEAD_BYTES = MAX_TARGET_BYTES + MAX_HEADER_BYTES + 1024
# Requests that may wait behind one that is being answered on the same connection.
MAX_PIPELINED = 16
# What chunk sizes, extensions and trailers may take besides a quarter of the body.
MAX_FRAMING_BYTES = 64 * 1024
# After an early answer the rest is read and dropped for a while, or the client would see a reset instead of it.
LINGER_S = 5.0
LINGER_BYTES = 128 * 2**20
# Connections beyond the limit: of those that are told so, and of those that were answered and only go on sending.
SPARE_CONNECTIONS = 64
SWEEP_S = 1.0
# A larger body is not copied to be joined to its head; it leaves in many pieces anyway.
JOINED_BYTES = 64 * 1024
HEAD_BEGINS = b"HTTP/"
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
Piece = bytes | bytearray | memoryview
Headers = Sequence[tuple[bytes, bytes]]
access_log = logging.getLogger("service.access")


@dataclass(frozen=True)
class ConnectionLimits:
    """What an operator can set. A rate is in bytes a second, and of replies."""

    max_connections: int
    header_timeout_s: float
    reply_timeout_s: float
    min_rate: int

    @classmethod
    def of(cls, settings: Settings, max_connections: int) -> ConnectionLimits:
        """The limits of settings, with as many connections as the process may have."""
        return cls(max_connections, settings.header_timeout, settings.reply_timeout, settings.min_rate)


class Connections:
    """All connections of one server. One timer looks after them, so that none costs a timer of its own."""

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits = limits
        self._metrics = metrics
        self._open: set[GuardedProtocol] = set()
        self._lingering: dict[GuardedProtocol, None] = {}  # in the order in which they began to
        self._sweep: asyncio.TimerHandle | None = None
        self._sweep_s = min(SWEEP_S, limits.header_timeout_s / 4, limits.reply_timeout_s / 4)
        metrics.connections.set_function(lambda: len(self._open) + len(self._lingering))

    def opened(self, connection: GuardedProtocol) -> None:
        """Look after a connection."""
        self._open.add(connection)
        if self._sweep is None:
            self._arm()

    def lingers(self, connection: GuardedProtocol) -> None:
        """Look after a connection whose client has its answer; it takes nobody's place."""
        self._open.discard(connection)
        self._lingering[connection] = None

    def closed(self, connection: GuardedProtocol) -> None:
        """Forget a connection."""
        self._open.discard(connection)
        self._lingering.pop(connection, None)

    @property
    def over(self) -> int:
        """How many connections there are beyond the limit, but for those that linger; 0 and less within."""
        return len(self._open) - self.limits.max_connections

    def make_room(self) -> None:
        """Close what another connection takes the room of, if anything can be: probes get through.

        That is the connection that has been idle for longest, or has lingered for longest once they are too many.
        """
        idle = [connection for connection in self._open if connection.is_idle] if self.over >= 0 else ()
        if idle:
            longest = min(idle, key=lambda connection: connection.since)
            self._open.discard(longest)
            longest.drop("too many connections")
        elif self._lingering and self.over + len(self._lingering) >= SPARE_CONNECTIONS:
            longest = next(iter(self._lingering))
            del self._lingering[longest]
            longest.drop("too many connections")

    def _arm(self) -> None:
        self._sweep = asyncio.get_running_loop().call_later(self._sweep_s, self._look)

    def _look(self) -> None:
        now = asyncio.get_running_loop().time()
        for connection in (*self._open, *self._lingering):
            connection.check(now)
        self._sweep = None
        if self._open or self._lingering:
            self._arm()

    def refusal(self, error: ServiceError, default_headers: Headers) -> bytes:
        """A whole reply that says no to what never became a request, counted and logged like one."""
        return copy_context().run(self._refusal, error, default_headers)

    def _refusal(self, error: ServiceError, default_headers: Headers) -> bytes:
        began = time.perf_counter()
        context = RequestContext(secrets.token_hex(8), span_below(None))
        CURRENT.set(context)
        reply = problem_response(error, context.request_id)
        headers = [
            *default_headers,
            *reply.raw_headers,
            (b"server-timing", b"total;dur=%.2f" % ((time.perf_counter() - began) * 1000)),
            (b"x-request-id", context.request_id.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"traceresponse", context.trace.traceparent().encode()),
            (b"connection", b"close"),
        ]
        reason = reason_of(type(error))
        self._metrics.requests.labels(OTHER, UNMATCHED, str(reply.status_code)).inc()
        self._metrics.rejected.labels(reason).inc()
        facts = {"method": OTHER, "route": UNMATCHED, "status": reply.status_code, "problem": reason}
        access_log.info("refused unread %d %s", reply.status_code, reason, extra=facts)
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        return b"".join((STATUS_LINE[reply.status_code], *lines, b"\r\n", bytes(reply.body)))

    def dropped(self, reason: str) -> None:
        """Count a connection that was closed without a reply, or before the end of one."""
        self._metrics.dropped_connections.labels(reason).inc()


class GuardedConfig(uvicorn.Config):
    """Uvicorn's configuration, with what its protocol needs to know."""

    def __init__(self, app: ASGIApp, connections: Connections, **given: Any) -> None:
        self.connections = connections
        # The service has no websockets; uvicorn would accept them on every path otherwise.
        super().__init__(app, http=GuardedProtocol, ws="none", **given)


class Stage(enum.Enum):
    """What the client of a connection is to send next."""

    HEAD = enum.auto()  # a request has begun, or the connection
    BODY = enum.auto()
    NOTHING = enum.auto()  # a request is whole; uvicorn closes what stays idle after its reply


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    After a refusal it is deaf: what comes is dropped. Requests that were whole before are answered first.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        assert isinstance(config, GuardedConfig)
        self._all = config.connections
        self._limits = config.connections.limits
        self._stage = Stage.HEAD
        self._since = self._window_from = self.loop.time()
        self._refusal: ServiceError | None = None
        self._answered: RequestResponseCycle | None = None  # others may wait behind it
        self._is_deaf = self._is_lingering = self._keeps_alive = False
        self._sent_before = self._dropped_bytes = 0
        self._start_head()

    def _start_head(self) -> None:
        self._raw_head_bytes = self._header_bytes = self._header_count = 0
        self._body_bytes = self._framing_bytes = 0

    # --- the connection ---

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection in; tell it no if there are too many."""
        super().connection_made(transport)
        self._wire = transport
        self.transport = self._door = _Door(transport, self)
        self._all.make_room()
        self._all.opened(self)
        if self._all.over > SPARE_CONNECTIONS:
            self.drop("too many connections")
        elif self._all.over > 0:
            limit = self._limits.max_connections
            self._refuse(ServiceBusy(f"all {limit:,} connections are taken; ask again"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it, and tell the app that nobody waits; uvicorn tells it of the request that was sent last only."""
        self._all.closed(self)
        if self._answered is not None and not self._answered.response_complete:
            self._answered.disconnected = True
            self._answered.message_event.set()
        super().connection_lost(exc)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answered = cycle
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        """Close it as soon as what is under way is answered."""
        self._keeps_alive = False
        if self._is_lingering:
            self._wire.close()
        else:
            super().shutdown()

    def drop(self, reason: str) -> None:
        """Close without another word, and count it under a reason."""
        self._all.dropped(reason)
        self._wire.abort()

    def _reset(self) -> None:
        """Drop a client that does not read, and what the system holds for it; a plain close would keep that."""
        self._wire.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
        self.drop("slow reader")

    # --- what comes in ---

    def data_received(self, data: bytes) -> None:
        """Parse what came, unless nothing of it matters any more."""
        if self._is_deaf or self._is_lingering:
            self._drop_data(len(data))
            return
        if self._stage is Stage.NOTHING:
            self._enter(Stage.HEAD)
        stage, body_bytes = self._stage, self._body_bytes
        super().data_received(data)
        if self._stage is not stage or self._is_deaf:
            return
        if stage is Stage.HEAD:
            self._raw_head_bytes += len(data)
            if self._raw_head_bytes > MAX_HEAD_BYTES:
                self._refuse(_headers_too_large())
        elif stage is Stage.BODY:
            self._count_framing(len(data) - (self._body_bytes - body_bytes))

    def _drop_data(self, size_bytes: int) -> None:
        self._dropped_bytes += size_bytes
        if self._dropped_bytes > LINGER_BYTES:
            self.drop("unread body")

    def _count_framing(self, size_bytes: int) -> None:
        self._framing_bytes += size_bytes
        if self._framing_bytes > MAX_FRAMING_BYTES + self._body_bytes // 4:
            self._refuse(MalformedRequest("the chunks of the body are too small, or say too much besides it"))

    def _enter(self, stage: Stage) -> None:
        if stage is not self._stage:
            self._stage, self._since = stage, self.loop.time()

    def on_message_begin(self) -> None:
        """A request begins."""
        self._start_head()
        self._enter(Stage.HEAD)
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        super().on_url(url)
        if len(self.url) > MAX_TARGET_BYTES:
            self._stop(TargetTooLong(f"the target of the request exceeds {MAX_TARGET_BYTES:,} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which nobody is told: it would come among the headers of a request under way."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value) + 4
        if self._header_count > MAX_HEADERS or self._header_bytes > MAX_HEADER_BYTES:
            self._stop(_headers_too_large())
        if self._stage is Stage.HEAD:
            super().on_header(name, value.rstrip(b" \t"))  # httptools leaves the blanks behind a value

    def on_headers_complete(self) -> None:
        """Hand the request on. Until it is whole, the reply to it says that the connection will be closed."""
        self._check_head()
        super().on_headers_complete()
        # An upgrade is not made; behind it httptools parses nothing more.
        self._keeps_alive = self.cycle.keep_alive and not self.parser.should_upgrade()
        self.cycle.keep_alive = False
        self._enter(Stage.BODY)

    def _check_head(self) -> None:
        """Refuse what another server on the way could understand otherwise (RFC 9112, sections 2.3, 3.2 and 6.1)."""
        version = self.parser.get_http_version()
        if version not in VERSIONS:
            self._stop(MalformedRequest(f"HTTP/{version} is not served, only HTTP/1.1"))
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and version == "1.1"):
            self._stop(MalformedRequest(f"{hosts} Host headers; a request has one"))
        if any(name == b"transfer-encoding" and value.lower() != b"chunked" for name, value in self.headers):
            self._stop(MalformedRequest("a body is sent as it is or chunked, and not encoded otherwise"))
        if len(self.pipeline) >= MAX_PIPELINED:
            self._stop(MalformedRequest(f"more than {MAX_PIPELINED} requests sent ahead"))

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole: another may follow it on this connection."""
        super().on_message_complete()
        if not self.cycle.response_started:
            self.cycle.keep_alive = self._keeps_alive
        self._enter(Stage.NOTHING)

    def _unsupported_upgrade_warning(self) -> None:
        """Nothing: to answer as if nobody had asked is what RFC 9110, section 7.8, has servers do."""

    # --- refusals ---

    def _stop(self, error: ServiceError) -> None:
        """End the parsing; the parser's error ends in `send_400_response`."""
        self._refusal = error
        raise error

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request; uvicorn's own way would be plain text, in the middle of another reply."""
        del msg
        self._refuse(self._refusal or MalformedRequest("this is not an HTTP/1.1 request"))

    def _refuse(self, error: ServiceError) -> None:
        """Say no, unless an earlier request of the connection is still to be answered; then close."""
        if self._is_deaf:
            return
        self._is_deaf = True
        is_half = self._stage is Stage.BODY
        if is_half and self.pipeline and self.pipeline[0][0] is self.cycle:
            self.pipeline.popleft()
        elif self.cycle is None or self.cycle.response_complete:
            self._answer(error)
        elif is_half and not self.cycle.response_started:
            self.cycle.disconnected = True  # its app is told that nobody waits
            self.cycle.message_event.set()
            self._answer(error)

    def _answer(self, error: ServiceError) -> None:
        self.transport.write(self._all.refusal(error, self.server_state.default_headers))
        self.transport.close()

    def on_response_complete(self) -> None:
        """Go on with the next request, if there is to be one."""
        is_last = not self.pipeline
        super().on_response_complete()
        if self._is_deaf and is_last and not self.transport.is_closing():
            self.transport.close()

    # --- the end ---

    @property
    def is_lingering(self) -> bool:
        """Whether everything is said, and the client may finish what it sends."""
        return self._is_lingering

    def end(self) -> None:
        """Close; if the client is still sending, half of it first, so that it reads the reply and not a reset."""
        is_unread = self._is_deaf or self._stage is Stage.BODY
        is_over = self._is_lingering or self._wire.is_closing()
        if is_over or not is_unread or not self._wire.can_write_eof():
            self._wire.close()
            return
        self._is_lingering, self._since = True, self.loop.time()
        self._all.lingers(self)
        self._wire.write_eof()
        self.flow.resume_reading()

    # --- time ---

    @property
    def is_idle(self) -> bool:
        """Whether no request is under way, nor a refusal: none has come whole, or all are answered and read."""
        is_answered = self.cycle is None or self.cycle.response_complete
        is_quiet = not self._is_deaf and not self._is_lingering and not self._wire.get_write_buffer_size()
        return is_answered and is_quiet and self._stage is not Stage.BODY

    @property
    def since(self) -> float:
        """When its stage began, on the event loop's clock, in seconds."""
        return self._since

    def check(self, now: float) -> None:
        """Close the connection if its client takes too long.

        Args:
            now: of the event loop's clock, in seconds.
        """
        if self._wire.get_write_buffer_size():
            self._check_reader(now)
            return
        self._window_from, self._sent_before = now, self._door.written_bytes
        if self._is_lingering:
            if now - self._since > LINGER_S:
                self.drop("unread body")
        elif self._stage is Stage.HEAD and not self._is_deaf:
            self._check_head_time(now)

    def _check_reader(self, now: float) -> None:
        """Each window of the reply's timeout must bring the client what the least rate asks for."""
        window_s = now - self._window_from
        self._since = now  # neither lingering nor the next request begins before it has read the reply
        if window_s < self._limits.reply_timeout_s:
            return
        sent = self._door.written_bytes - self._wire.get_write_buffer_size()
        if sent - self._sent_before < self._limits.min_rate * window_s:
            self._reset()
        self._window_from, self._sent_before = now, sent

    def _check_head_time(self, now: float) -> None:
        if self.flow.read_paused:  # it is not read because of an earlier request
            self._since = now
        elif now - self._since <= self._limits.header_timeout_s:
            return
        elif self._raw_head_bytes:
            self._refuse(SlowRequest(f"the headers did not come within {self._limits.header_timeout_s:g} s"))
        else:
            self.drop("no request")


class _Door(asyncio.Transport):
    """The transport that uvicorn sees: counts what is written, and ends as the protocol wants it.

    The head of a reply waits for its body, for one turn of the event loop at most. In one piece they leave with one
    call of the system, and if the process is killed a gateway has both or neither: once it has passed on a head, it
    cannot ask another replica any more.
    """

    def __init__(self, wire: asyncio.Transport, protocol: GuardedProtocol) -> None:
        super().__init__()
        self._wire = wire
        self._protocol = protocol
        self._head: Piece = b""
        self.written_bytes = 0

    def write(self, data: Piece) -> None:
        """Send bytes, when there is room."""
        if self._head and len(data) <= JOINED_BYTES:
            head, self._head = self._head, b""
            self._send(b"".join((head, data)))
        elif data[:5] == HEAD_BEGINS:
            self.flush()
            self._head = data
            self._protocol.loop.call_soon(self.flush)
        else:
            self.flush()
            self._send(data)

    def flush(self) -> None:
        """Send a head whose body does not come at once."""
        if self._head:
            head, self._head = self._head, b""
            self._send(head)

    def _send(self, data: Piece) -> None:
        if not self._wire.is_closing():
            self.written_bytes += len(data)
            self._wire.write(data)

    def is_closing(self) -> bool:
        """Whether nothing more will be said."""
        return self._protocol.is_lingering or self._wire.is_closing()

    def close(self) -> None:
        """Close, when what was written has left."""
        self.flush()
        self._protocol.end()


def _headers_too_large() -> HeadersTooLarge:
    return HeadersTooLarge(f"the headers exceed {MAX_HEADERS} or {MAX_HEADER_BYTES:,} bytes")
