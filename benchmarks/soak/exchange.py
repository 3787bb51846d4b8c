"""One request and its reply over a socket, whatever the request looks like."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field

import httptools

CUT_OFF = 0
PATIENCE_S = 90.0
READ_BYTES = 1 << 18


@dataclass
class Tally:
    """What one kind of sender met: replies by status, and seconds of those that were answered with 200."""

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)

    def note(self, status: int, seconds: float) -> None:
        """Count one reply; status 0 is a connection that was closed without one."""
        self.statuses[status] += 1
        if status == 200:
            self.latencies_s.append(seconds)


class _Reply:
    """What the parser tells of a reply: it came to its end, and whether the connection may be used again."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_complete = False

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_complete = True


class Connection:
    """A connection that is opened when it is first needed, and again once the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> int:
        """The status of the reply, `CUT_OFF` where none came."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._ask(message)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, httptools.HttpParserError):
            self.close()
            return CUT_OFF

    async def _ask(self, message: bytes) -> int:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(message)
        with suppress(ConnectionError):  # a refusal may be there although not all was taken
            await writer.drain()
        return await self._status(reader)

    async def _status(self, reader: asyncio.StreamReader) -> int:
        reply = _Reply()
        while not reply.is_complete:
            data = await reader.read(READ_BYTES)
            if not data:
                self.close()
                return CUT_OFF
            reply.parser.feed_data(data)
        if not reply.parser.should_keep_alive():
            self.close()
        return int(reply.parser.get_status_code())

    def close(self) -> None:
        """Close it at once, read or not."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


@contextmanager
def timed(tally: Tally) -> Iterator[list[int]]:
    """Note the status that is put into the list."""
    started = time.perf_counter()
    statuses: list[int] = []
    yield statuses
    for status in statuses:
        tally.note(status, time.perf_counter() - started)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection that is closed at the end."""
    connection = Connection(port)
    try:
        yield connection
    finally:
        connection.close()
