"""Connections to addresses that were checked, for httpcore: the name in the URL is not looked up again."""

from __future__ import annotations

import ssl
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final

import httpcore

from service.images.addresses import Address

MAX_TRIED: Final = 3
MAX_HEAD_BYTES: Final = 32 * 1024
# What comes in one read is parsed in one go: a head made of thousands of interim replies must not hold the event loop.
HEAD_READ_BYTES: Final = 4 * 1024


class PinnedBackend(httpcore.AsyncNetworkBackend):
    """Connects to one of `addresses`, whatever the URL says; TLS and `Host` stay those of the name.

    A context that closes what was opened, also where a handshake was cancelled half way.
    """

    def __init__(self, addresses: Sequence[Address]) -> None:
        self._addresses = addresses[:MAX_TRIED]
        self._network = httpcore.AnyIOBackend()
        self._wire: Wire | None = None

    async def __aenter__(self) -> PinnedBackend:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._wire is not None:
            await self._wire.aclose()

    async def connect_tcp(
        self,
        host: str,  # noqa: ARG002 - it was looked up and checked
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's interface, as below
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> Wire:
        """A connection to the first address that answers; each has an equal share of the time.

        Raises:
            httpcore.ConnectError, httpcore.ConnectTimeout: none did; what the last one failed with.
        """
        share_s = None if timeout is None else timeout / len(self._addresses)
        failure: Exception = httpcore.ConnectError("no address")
        for address in self._addresses:
            try:
                stream = await self._network.connect_tcp(
                    str(address), port, share_s, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
                continue
            self._wire = Wire(stream)
            return self._wire
        raise failure

    def head_is_read(self) -> None:
        """The body follows, whose bytes are counted elsewhere."""
        if self._wire is not None:
            self._wire.head_is_read()


class Wire(httpcore.AsyncNetworkStream):
    """One connection, below or above TLS, which gives up a head of more than `MAX_HEAD_BYTES`."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream
        self._secured: Wire | None = None
        self._head_bytes: int | None = 0

    def head_is_read(self) -> None:
        """From now on reads are not bounded here."""
        self._head_bytes = None
        if self._secured is not None:
            self._secured.head_is_read()

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ASYNC109
        """Bytes of the reply.

        Raises:
            httpcore.ReadError: the head has no end.
        """
        if self._head_bytes is None:
            return await self._stream.read(max_bytes, timeout)
        if self._head_bytes >= MAX_HEAD_BYTES:
            raise httpcore.ReadError("the head of the reply has no end")
        data = await self._stream.read(min(max_bytes, HEAD_READ_BYTES), timeout)
        self._head_bytes += len(data)
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ASYNC109
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109
    ) -> Wire:
        """The same connection behind TLS, checked for the name."""
        self._secured = Wire(await self._stream.start_tls(ssl_context, server_hostname, timeout))
        return self._secured

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
