"""Bytes on a socket, for what no HTTP client would send."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class RawReply:
    """One reply as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    def problem(self, status: int, kind: str) -> dict[str, Any]:
        """The problem document, which is of this status and of `/problems/{kind}`; the connection ends with it."""
        assert self.status == status, f"{self.status} {self.body[:500]!r}"
        assert self.headers["content-type"] == "application/problem+json"
        assert self.headers["connection"] == "close"
        body: dict[str, Any] = json.loads(self.body)
        assert body["type"] == f"/problems/{kind}"
        assert body["status"] == status
        assert body["request_id"] == self.headers["x-request-id"]
        return body


class RawClient:
    """One connection to a service."""

    def __init__(self, url: str) -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self.socket = socket.create_connection((host, int(port)), TIMEOUT_S)
        self._in = self.socket.makefile("rb")

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc: object) -> None:
        self._in.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        """Send it all."""
        self.socket.sendall(data)

    def send_until_refused(self, pieces: Iterable[bytes]) -> int:
        """How many bytes went out before the other side would have no more."""
        sent = 0
        for piece in pieces:
            try:
                self.socket.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += len(piece)
        return sent

    def reply(self) -> RawReply:
        """The next reply."""
        status = int(self._in.readline().split()[1])
        headers: dict[str, str] = {}
        while line := self._in.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return RawReply(status, headers, self._in.read(int(headers.get("content-length", 0))))

    def is_answered(self, within_s: float) -> bool:
        """Whether something comes, or the connection ends, in this time."""
        readable, _, _ = select.select([self.socket], [], [], within_s)
        return bool(readable)

    def is_closed(self) -> bool:
        """Whether nothing more comes; waits until that is sure."""
        try:
            return self._in.read(1) == b""
        except ConnectionResetError:
            return True

    def is_reset(self) -> bool:
        """Whether the connection ends in a reset, whatever comes before."""
        try:
            while self.socket.recv(1024 * 1024):
                pass
        except ConnectionResetError:
            return True
        return False
