"""A real nginx with the configuration of `deploy/`, in front of whatever listens on some ports of loopback."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
Edit = Callable[[str], str]


def find_nginx() -> str:
    """The command of an installed nginx; a test cannot go on without, and fails in continuous integration."""
    command = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if command is None:
        missing = "no nginx is installed: apt-get install nginx"
        if os.environ.get("CI"):
            pytest.fail(missing)
        pytest.skip(missing)
    return command


def replaced(*pairs: tuple[str, str]) -> Edit:
    """A file with some of its text replaced, all of which must be there."""

    def edit(text: str) -> str:
        for old, new in pairs:
            assert old in text, old
            text = text.replace(old, new)
        return text

    return edit


def uncommented(*starts: str) -> Edit:
    """A file with the # taken off the lines that begin so."""

    def edit(text: str) -> str:
        lines = [
            line[1:] if line.startswith(tuple(f"#{start}" for start in starts)) else line
            for line in text.split("\n")
        ]
        assert lines != text.split("\n")
        return "\n".join(lines)

    return edit


def listening() -> socket.socket:
    """A socket that nginx inherits: what connects before nginx runs waits in its queue, so nobody has to."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=511)
    sock.set_inheritable(True)
    return sock


class Gateway:
    """nginx in the foreground, on a free port.

    Args:
        ports: where the replicas listen.
        edits: by the name of a file in `deploy/`, what an operator changes in it.
    """

    def __init__(self, folder: Path, ports: Sequence[int], edits: dict[str, Edit] | None = None) -> None:
        command = find_nginx()
        self._folder = folder
        shutil.copytree(DEPLOY / "gateway", folder / "gateway")
        shutil.copy(DEPLOY / "nginx.conf", folder)
        (folder / "written").mkdir()
        self.replicas(ports)
        with listening() as plain, listening() as secure:
            self.port, self.tls_port = plain.getsockname()[1], secure.getsockname()[1]
            self._edit("gateway/listen.conf", replaced(("listen 8080", f"listen 127.0.0.1:{self.port}")))
            self._edit("gateway/listen.conf", replaced(("listen 8443", f"listen 127.0.0.1:{self.tls_port}")))
            for name, edit in (edits or {}).items():
                self._edit(name, edit)
            self._start(command, plain, secure)
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def _edit(self, name: str, edit: Edit) -> None:
        path = self._folder / name
        path.write_text(edit(path.read_text()))

    def _start(self, command: str, *sockets: socket.socket) -> None:
        inherited = ";".join(str(sock.fileno()) for sock in sockets) + ";"
        user = (
            "user root; " if os.geteuid() == 0 else ""
        )  # else the workers could not reach the test's folder
        with (
            (self._folder / "access.log").open("wb") as access,
            (self._folder / "error.log").open("wb") as error,
        ):
            self._process = subprocess.Popen(
                [command, *self._flags(), "-g", f"{user}daemon off;"],
                env={**os.environ, "NGINX": inherited},
                pass_fds=[sock.fileno() for sock in sockets],
                stdout=access,
                stderr=error,
            )

    def _flags(self) -> list[str]:
        return ["-e", "stderr", "-p", f"{self._folder}/written", "-c", f"{self._folder}/nginx.conf"]

    def replicas(self, ports: Sequence[int]) -> None:
        """Write where the replicas listen, each as the file of the repository has it."""
        [line] = [
            line for line in (DEPLOY / "gateway/replicas.conf").read_text().splitlines() if line[0] != "#"
        ]
        lines = [line.replace("backbone:8000", f"127.0.0.1:{port}") for port in ports]
        (self._folder / "gateway/replicas.conf").write_text("\n".join(lines))

    def over_tls(self, certificate: Path) -> httpx.Client:
        context = ssl.create_default_context(cafile=str(certificate))
        return httpx.Client(base_url=f"https://localhost:{self.tls_port}", verify=context, trust_env=False)

    def exchange(self, sent: bytes) -> bytes:
        """All that comes back for some bytes, until nginx closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: connection.recv(65536), b""))

    def stop(self) -> None:
        """Stop when what is in flight is done; the logs are complete then."""
        self.http.close()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGQUIT)
        assert self._process.wait(60) == 0, self.complaints

    @property
    def complaints(self) -> str:
        """What nginx itself had to say."""
        return (self._folder / "error.log").read_text()

    def log(self) -> list[dict[str, Any]]:
        """The requests that were answered; nginx is stopped for it."""
        self.stop()
        return [json.loads(line) for line in (self._folder / "access.log").read_text().splitlines()]
