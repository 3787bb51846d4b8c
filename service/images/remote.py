"""Fetch images by their URLs: bounded in hosts, addresses, redirects, bytes and time.

Every host is checked against the operator's list, all addresses of its name against the rule, and the connection goes
to a checked address; a redirect starts anew. Nothing of the environment (proxies, credentials) and nothing of the
client's request but the URL goes out, and nothing that a remote host says comes back but its status.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import httpcore
import httpx

from service.errors import (
    CannotStart,
    Fault,
    InvalidConfig,
    RemoteFailed,
    RemoteTimeout,
    ServiceError,
    TooLarge,
)
from service.images.addresses import Address, AddressRule
from service.images.connections import PinnedBackend
from service.images.hosts import AllowedHosts, ImageUrl, RefusedUrlError, is_address
from service.images.lookups import Lookups
from service.metrics import Metrics
from service.settings import Settings

MAX_REDIRECTS: Final = 3
REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
REACH_S: Final = 2.0  # for a lookup, for a connection, and for its TLS
AT_ONCE: Final = 256
AT_ONCE_OF_A_REQUEST: Final = 8
MAX_ADDRESSES: Final = 64
# A reply of tiny pieces costs the event loop far more than its bytes would.
PIECES_FOR_FREE: Final = 1000
MIN_PIECE_BYTES: Final = 512
HEADERS: Final = (
    ("User-Agent", "backbone-service"),
    ("Accept", "image/*"),
    ("Accept-Encoding", "identity"),
    ("Connection", "close"),
)
# Whether a name has no address, one that is refused, or one where nothing answers is the network's secret.
UNREACHABLE: Final = "its host cannot be reached"
log = logging.getLogger("service.images")


class FetchFailedError(Exception):
    """A fetch came to nothing: `outcome` is for the operator's counters, the text for the client."""

    def __init__(self, outcome: str, detail: str, kind: type[ServiceError] = RemoteFailed) -> None:
        super().__init__(detail)
        self.outcome = outcome
        self.detail = detail
        self.kind = kind


@dataclass
class _Budget:
    """The bytes that the images of one request may have together."""

    left: int
    of: int

    def refuse_announced(self, size: int) -> None:
        if size > self.left:
            raise FetchFailedError("large", f"with it the images exceed {self.of:,} bytes", TooLarge)

    def take(self, size: int) -> None:
        self.refuse_announced(size)
        self.left -= size


class RemoteImages:
    """Fetches images. Use it, and `stop` it, inside one event loop.

    Args:
        tls: which certificates are good.
        timeout_s: of each image, from its lookup to its last byte, redirects included.
    """

    def __init__(
        self,
        hosts: AllowedHosts,
        rule: AddressRule,
        tls: ssl.SSLContext,
        metrics: Metrics,
        *,
        lookups: Lookups,
        timeout_s: float,
    ) -> None:
        self._hosts = hosts
        self._rule = rule
        self._tls = tls
        self._metrics = metrics
        self._timeout_s = timeout_s
        self._lookups = lookups
        self._slots = asyncio.Semaphore(AT_ONCE)

    @classmethod
    def of(cls, settings: Settings, metrics: Metrics, lookups: Lookups | None = None) -> RemoteImages:
        """As the settings say, with the system's resolver unless another is given.

        Raises:
            CannotStart: a setting is not valid.
        """
        return cls(
            AllowedHosts.of(settings.image_hosts),
            AddressRule.of(settings.image_networks),
            _tls(settings.image_ca_file),
            metrics,
            lookups=Lookups() if lookups is None else lookups,
            timeout_s=settings.image_timeout,
        )

    def read(self, urls: Mapping[int, str]) -> dict[int, ImageUrl]:
        """The URLs of a request, by the index of the image. Nothing is looked up.

        Raises:
            InvalidConfig: one of them is not fetched, with its pointer.
        """
        return {index: self._read(index, text) for index, text in urls.items()}

    def _read(self, index: int, text: str) -> ImageUrl:
        try:
            return self._hosts.checked(ImageUrl.of(text))
        except RefusedUrlError as error:
            raise InvalidConfig(_pointer(index), str(error)) from error

    async def fetch(self, urls: Mapping[int, ImageUrl], max_bytes: int) -> dict[int, bytes]:
        """The images, fetched side by side. The first failure ends the others; so does the caller's cancellation.

        Args:
            max_bytes: of all of them together.

        Raises:
            RemoteFailed, RemoteTimeout, TooLarge: what became of one of them.
        """
        budget = _Budget(max_bytes, max_bytes)
        turns = asyncio.Semaphore(AT_ONCE_OF_A_REQUEST)

        async def in_turn(index: int, url: ImageUrl) -> bytes:
            async with turns, self._slots:
                return await self._fetched(index, url, budget)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = {index: group.create_task(in_turn(index, url)) for index, url in urls.items()}
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return {index: task.result() for index, task in tasks.items()}

    async def _fetched(self, index: int, url: ImageUrl, budget: _Budget) -> bytes:
        """One image; what becomes of it is counted."""
        began, outcome = time.perf_counter(), "abandoned"
        self._metrics.image_fetches_in_flight.inc()
        try:
            data = await self._in_time(url, budget)
            outcome = "fetched"
            self._metrics.image_fetched_bytes.inc(len(data))
            return data
        except FetchFailedError as failure:
            outcome = failure.outcome
            log.info("an image of host %s was not fetched: %s", url.host, outcome)
            detail = f"image {index}: {failure.detail}"
            raise failure.kind(detail, faults=[Fault(_pointer(index), failure.detail)]) from failure
        finally:
            self._metrics.image_fetches_in_flight.dec()
            self._metrics.image_fetches.labels(outcome).inc()
            self._metrics.image_fetch_seconds.observe(time.perf_counter() - began)

    async def _in_time(self, url: ImageUrl, budget: _Budget) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._followed(url, budget)
        except TimeoutError as error:
            detail = f"its host did not send it within {self._timeout_s:g} s"
            raise FetchFailedError("slow", detail, RemoteTimeout) from error

    async def _followed(self, url: ImageUrl, budget: _Budget) -> bytes:
        """The image at the end of the redirects."""
        for _ in range(MAX_REDIRECTS + 1):
            async with self._answer(url) as response:
                if response.status not in REDIRECTS:
                    return await _body(response, budget)
                url = self._led_to(url, response)
        raise FetchFailedError("redirected", f"more than {MAX_REDIRECTS} redirects")

    def _led_to(self, url: ImageUrl, response: httpcore.Response) -> ImageUrl:
        try:
            return self._hosts.checked(url.led_to(_header(response, b"location")))
        except RefusedUrlError as error:
            raise FetchFailedError("redirected", "its host leads to a URL that is not allowed") from error

    @asynccontextmanager
    async def _answer(self, url: ImageUrl) -> AsyncIterator[httpcore.Response]:
        """The reply to one GET, whose head is read; the connection ends with the context."""
        target = httpcore.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        headers = [("Host", url.authority), *HEADERS]
        addresses = await self._addresses(url.host)
        with _network_errors():
            async with PinnedBackend(addresses) as backend:
                connection = httpcore.AsyncHTTPConnection(
                    target.origin, ssl_context=self._tls, network_backend=backend
                )
                async with connection.stream(
                    "GET", target, headers=headers, extensions={"timeout": {"connect": REACH_S}}
                ) as response:
                    backend.head_is_read()
                    yield response

    async def _addresses(self, host: str) -> tuple[Address, ...]:
        """The addresses of a host, if all of them may be connected to."""
        found = (ip_address(host),) if is_address(host) else await self._looked_up(host)
        if len(found) > MAX_ADDRESSES or not all(self._rule.allows(address) for address in found):
            raise FetchFailedError("denied", UNREACHABLE)
        return found

    async def _looked_up(self, host: str) -> tuple[Address, ...]:
        try:
            async with asyncio.timeout(REACH_S):
                return await self._lookups.addresses(host)
        except (OSError, TimeoutError) as error:
            raise FetchFailedError("unresolved", UNREACHABLE) from error

    def stop(self) -> None:
        """End the threads of the resolver."""
        self._lookups.stop()


def _tls(ca_file: Path | None) -> ssl.SSLContext:
    """Certificates checked against the public authorities, or those of a PEM file in their place."""
    if ca_file is None:
        return httpx.create_ssl_context(trust_env=False)
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as error:  # ssl.SSLError is one
        raise CannotStart("BACKBONE_IMAGE_CA_FILE: the file cannot be read, or is not PEM") from error


async def _body(response: httpcore.Response, budget: _Budget) -> bytes:
    """The bytes of a 200 that is not compressed, counted as they come."""
    if response.status != 200:
        raise FetchFailedError("status", f"its host answered {response.status}")
    if _header(response, b"content-encoding").lower() not in ("", "identity"):
        raise FetchFailedError("compressed", "its host sent it compressed, and was asked not to")
    budget.refuse_announced(int(_header(response, b"content-length") or 0))  # h11 lets digits through only
    pieces: list[bytes] = []
    received = 0
    async for piece in response.aiter_stream():
        budget.take(len(piece))
        received += len(piece)
        pieces.append(piece)
        if len(pieces) > PIECES_FOR_FREE + received // MIN_PIECE_BYTES:
            raise FetchFailedError("broken", "its host sent it in too small pieces")
    return b"".join(pieces)


def _header(response: httpcore.Response, name: bytes) -> str:
    """The first value of a header, empty without one; names are lower case by now."""
    return next((value.decode("latin-1") for key, value in response.headers if key.lower() == name), "")


@contextmanager
def _network_errors() -> Iterator[None]:
    """What goes wrong on the way, by whether there was a connection."""
    try:
        yield
    except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
        raise FetchFailedError("unreachable", UNREACHABLE) from error
    except (httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
        raise FetchFailedError("broken", "its host broke off, or did not answer in HTTP") from error


def _pointer(index: int) -> str:
    return f"#/images/{index}/url"
