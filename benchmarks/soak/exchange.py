"""One request and its reply over a socket, whatever the request looks like."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from heapq import nlargest

import httptools

PATIENCE_S = 90.0
SLOWEST_KEPT = 8
READ_BYTES = 1 << 18


@dataclass
class Tally:
    """What one kind of sender met: replies by status, seconds of those that were answered with 200, and of the
    slowest of them when they came and what the server says of its stages.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    latencies_s: list[float] = field(default_factory=list)
    slowest: list[tuple[float, float, str]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    def note(self, answer: Answer, seconds: float) -> None:
        """Count one reply."""
        self.statuses[answer.status] += 1
        if answer.status == 200:
            self.latencies_s.append(seconds)
            self.slowest = nlargest(
                SLOWEST_KEPT, [*self.slowest, (seconds, time.monotonic() - self.began, answer.stages)]
            )


@dataclass(frozen=True)
class Answer:
    """The status of a reply, 0 for a connection that was closed without one; and its `Server-Timing`."""

    status: int
    stages: str = ""


CUT_OFF = Answer(0)


class _Reply:
    """What the parser tells of a reply: it came to its end, and whether the connection may be used again."""

    def __init__(self) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.is_complete = False
        self.stages = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Called by the parser."""
        if name.lower() == b"server-timing":
            self.stages = value.decode("latin-1")

    def on_message_complete(self) -> None:
        """Called by the parser."""
        self.is_complete = True


class Connection:
    """A connection that is opened when it is first needed, and again once the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, message: bytes) -> Answer:
        """What was replied, `CUT_OFF` where nothing was."""
        try:
            async with asyncio.timeout(PATIENCE_S):
                return await self._ask(message)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, httptools.HttpParserError):
            self.close()
            return CUT_OFF

    async def _ask(self, message: bytes) -> Answer:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(message)
        with suppress(ConnectionError):  # a refusal may be there although not all was taken
            await writer.drain()
        return await self._answer(reader)

    async def _answer(self, reader: asyncio.StreamReader) -> Answer:
        reply = _Reply()
        while not reply.is_complete:
            data = await reader.read(READ_BYTES)
            if not data:
                self.close()
                return CUT_OFF
            reply.parser.feed_data(data)
        if not reply.parser.should_keep_alive():
            self.close()
        return Answer(int(reply.parser.get_status_code()), reply.stages)

    def close(self) -> None:
        """Close it at once, read or not."""
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


@contextmanager
def timed(tally: Tally) -> Iterator[list[Answer]]:
    """Note the answer that is put into the list."""
    started = time.perf_counter()
    answers: list[Answer] = []
    yield answers
    for answer in answers:
        tally.note(answer, time.perf_counter() - started)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[Connection]:
    """A connection that is closed at the end."""
    connection = Connection(port)
    try:
        yield connection
    finally:
        connection.close()
