"""Remote hosts of images on loopback that do what they are told, byte by byte; and a resolver of the test's own."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Sequence
from ipaddress import ip_address

from service.images.addresses import Address
from service.images.lookups import Lookups

Act = Callable[[socket.socket], None]


def reply(body: bytes = b"", status: int = 200, **headers: str) -> bytes:
    """A whole reply; `Content_Length` and the like become headers."""
    given = {"Content_Length": str(len(body)), **headers}
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in given.items()]
    return f"HTTP/1.1 {status} -\r\n{''.join(lines)}\r\n".encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    return reply(status=status, Location=location)


def endlessly(head: bytes, piece: bytes) -> Act:
    """Sends the head, then the piece again and again until the client hangs up."""

    def act(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)

    return act


def then_silent(data: bytes) -> Act:
    """Sends something and then waits until the client hangs up."""

    def act(connection: socket.socket) -> None:
        connection.sendall(data)
        connection.recv(1)

    return act


class Remote:
    """A host on one address of loopback. `answers` are by path; any other path is a 404.

    `heads` are the requests as they came, `connections` how many there were; `asked` is set by a request, and
    `hung_up` when the client has closed a connection before its answer was whole. The greeting is sent before anything
    is read.
    """

    def __init__(
        self,
        tls: ssl.SSLContext | None = None,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        greeting: bytes = b"",
    ) -> None:
        self.answers: dict[str, bytes | Act] = {}
        self.heads: list[str] = []
        self.connections = 0
        self.asked = threading.Event()
        self.hung_up = threading.Event()
        self._tls = tls
        self._greeting = greeting
        self._listener = socket.create_server((address, port))
        self.port: int = self._listener.getsockname()[1]
        self.host = f"{address}:{self.port}"
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)

    def paths(self) -> list[str]:
        """What was asked for, in order."""
        return [head.split(" ")[1] for head in self.heads]

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._open.append(connection)
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, raw: socket.socket) -> None:
        try:
            connection = self._tls.wrap_socket(raw, server_side=True) if self._tls else raw
            with connection:
                self._answer(connection)
        except OSError:
            self.hung_up.set()
        finally:
            raw.close()

    def _answer(self, connection: socket.socket) -> None:
        connection.sendall(self._greeting)
        head = b""
        while b"\r\n\r\n" not in head:
            more = connection.recv(4096)
            if not more:
                return
            head += more
        self.heads.append(head.decode())
        self.asked.set()
        answer = self.answers.get(self.paths()[-1], reply(status=404))
        if isinstance(answer, bytes):
            connection.sendall(answer)
            return
        answer(connection)
        self.hung_up.set()


class Names:
    """A resolver of the test's: each name has a list of answers, one lookup after the other; the last one stays."""

    def __init__(self, **answers: Sequence[str | Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    def __call__(self, host: str) -> tuple[Address, ...]:
        self.asked.append(host)
        given = self.answers.get(host)
        if not given:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        answer = given.pop(0) if len(given) > 1 else given[0]
        return tuple(ip_address(text) for text in ([answer] if isinstance(answer, str) else answer))

    @property
    def lookups(self) -> Lookups:
        return Lookups(self)
