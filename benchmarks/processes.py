"""Servers and measuring code as processes of their own."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import psutil

from benchmarks.failures import ServerFailed
from benchmarks.load import process_tree

ROOT = Path(__file__).parent.parent
START_PATIENCE_S = 120.0
STOP_PATIENCE_S = 15.0
ORPHAN_PATIENCE_S = 1.0


@dataclass(frozen=True)
class Launch:
    """How a server is started."""

    command: Sequence[str]
    health_path: str
    environment: Mapping[str, str] = field(default_factory=dict)


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def clean_environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment without the settings of whoever runs this."""
    prefixes = ("BACKBONE_", "OMP_", "MOSEC_", "OPENVINO_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    return {**kept, **given}


class Server:
    """A server under measurement: its port, its processes and when it came up."""

    def __init__(self, launch: Launch, port: int, log_path: Path) -> None:
        self.port = port
        self._log_path = log_path
        self._health_path = launch.health_path
        self.started_at = time.perf_counter()
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                launch.command, cwd=ROOT, env=clean_environment(launch.environment), stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        """The process that was started; the others are its descendants."""
        return self._process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def wait_until_up(self) -> float:
        """Seconds from its start to its first 200 of the health route.

        Raises:
            ServerFailed: it ended or was not up within two minutes.
        """
        until = self.started_at + START_PATIENCE_S
        while not self._is_up():
            if self._process.poll() is not None or time.perf_counter() > until:
                raise ServerFailed(self.log_tail())
            time.sleep(0.01)  # another process: there is nothing to wait on
        return time.perf_counter() - self.started_at

    def _is_up(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", self._health_path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def log_tail(self) -> str:
        """The last that it printed."""
        return self._log_path.read_text(errors="replace")[-3000:]

    def pause(self) -> None:
        """Stop all its processes, so that what idles does not take cores from what is measured."""
        for process in process_tree(self.pid):
            with suppress(psutil.NoSuchProcess):  # a converter that is done
                process.suspend()

    def resume(self) -> None:
        """Let them go on."""
        for process in process_tree(self.pid):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes; resident size where the system has no such number."""
        facts = [process.memory_full_info() for process in process_tree(self.pid)]
        return sum(getattr(fact, "pss", fact.rss) for fact in facts)

    def stop(self) -> None:
        """End it and whatever it leaves behind."""
        if self._process.poll() is None:
            family = process_tree(self.pid)
            self.resume()
            self._process.send_signal(signal.SIGTERM)
            psutil.wait_procs(family[:1], STOP_PATIENCE_S)
            _, left = psutil.wait_procs(family, ORPHAN_PATIENCE_S)
            for process in left:
                process.kill()
            psutil.wait_procs(left, STOP_PATIENCE_S)
        self._process.wait()


@contextmanager
def running(launch: Callable[[int], Launch], folder: Path) -> Iterator[Server]:
    """A server on a free port, stopped at the end; `wait_until_up` is the caller's."""
    port = free_port()
    server = Server(launch(port), port, folder / f"server-{port}.log")
    try:
        yield server
    finally:
        server.stop()


def own_process(prepare: Callable[[], object] | None = None) -> ProcessPoolExecutor:
    """A process for one kind of work; `prepare` runs in it first. It sleeps between calls."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=prepare)
