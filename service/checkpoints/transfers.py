"""One download while it goes on: how far it is, and what ends it in time."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Lock, Timer
from typing import Any, Final

from service.errors import RemoteFailed, RemoteTimeout

CONNECTED: Final = frozenset({"connection.connect_tcp.complete", "connection.start_tls.complete"})


class Watch:
    """Ends the connections of one download at its deadline, which a byte a second would never meet by itself.

    Timeouts of a socket are of one read each: they bound neither a body nor the head of an answer.
    """

    def __init__(self, seconds: float) -> None:
        self._deadline = time.monotonic() + seconds
        self._lock = Lock()
        self._sockets: list[socket.socket] = []
        self._is_stopped = False
        self._timer = Timer(seconds, self._cut)
        self._timer.daemon = True

    def __enter__(self) -> Watch:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    @property
    def is_over(self) -> bool:
        """Whether the time is up, or the download was stopped."""
        return self._is_stopped or time.monotonic() >= self._deadline

    def check(self, name: str) -> None:
        """Whether there is time left.

        Raises:
            RemoteTimeout: there is none.
            RemoteFailed: the download was stopped.
        """
        if self._is_stopped:
            raise RemoteFailed(f"{name}: the download was stopped")
        if self.is_over:
            raise RemoteTimeout(f"{name}: the download took too long")

    def trace(self, event: str, info: Mapping[str, Any]) -> None:
        """HTTPX tells here of its connections (its `trace` extension)."""
        if event not in CONNECTED:
            return
        with self._lock:
            self._sockets.append(info["return_value"].get_extra_info("socket"))
        if self.is_over:
            self._cut()

    def stop(self) -> None:
        """End the download now."""
        self._is_stopped = True
        self._cut()

    def _cut(self) -> None:
        with self._lock:
            for connection in self._sockets:
                # Not an SSL socket's own method, which takes the keys from under the thread that reads.
                with suppress(OSError):  # closed since
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)


@dataclass
class Transfer:
    """How far a download is: written by the thread that does it, read by others.

    Attributes:
        name: what it is called.
        started: when, in seconds since the epoch.
        received: bytes of the file that are here, those of an earlier download included.
        total: bytes of the file, None where nobody has said.
        fetched: bytes that came over the network.
    """

    name: str
    started: float = field(default_factory=time.time)
    received: int = 0
    total: int | None = None
    fetched: int = 0
    _watch: Watch | None = None
    _is_stopped: bool = False

    def begin(self, watch: Watch) -> None:
        """From now on the watch can end it."""
        self._watch = watch
        if self._is_stopped:
            watch.stop()

    def came(self, count: int) -> None:
        """So many bytes came."""
        self.received += count
        self.fetched += count

    def stop(self) -> None:
        """End it now, or as soon as it begins."""
        self._is_stopped = True
        if self._watch is not None:
            self._watch.stop()
