"""The HTTP server process: uvicorn, told to drain before it stops."""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import signal
import socket
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.access import Access
from service.api.app import create_app
from service.api.connections import SPARE_CONNECTIONS, ConnectionLimits, Connections, GuardedConfig
from service.api.startup import Startup
from service.errors import CannotStart
from service.settings import Settings

# Open files of a process that are no connections: libraries, checkpoints, caches, the engines' own.
OTHER_FILES = 200
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
log = logging.getLogger("service.server")


class DrainingServer(uvicorn.Server):
    """Uvicorn that finishes what is in flight before it closes its door.

    While requests are in flight after the first signal it still listens: `/readyz` and every new request are
    answered 503, so that a load balancer learns of it instead of meeting a closed port. A second signal ends the
    process at once.
    """

    def __init__(self, config: uvicorn.Config, startup: Startup, access: Access, drain_s: float) -> None:
        super().__init__(config)
        self._startup = startup
        self._access = access
        self._drain_s = drain_s
        self._drain_until = math.inf
        self._is_told = False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a stop that was asked for and went well is not raised again: the exit status is 0."""
        with super().capture_signals(), self._access.reading_keys_on_hangup():
            yield
            self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the next signal is the system's to handle, whatever this process is busy with."""
        self._startup.drain()
        self._drain_until = time.monotonic() + self._drain_s
        for stop_signal in STOP_SIGNALS:
            signal.signal(stop_signal, signal.SIG_DFL)
        super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave the main loop: told to stop, and nothing in flight or no time left for it."""
        self.should_exit = self.should_exit or self._startup.failure is not None
        stopping = await super().on_tick(counter)
        if stopping and not self._is_told:  # a signal handler must not log
            self._is_told = True
            self._startup.give_up()
            log.info("draining: requests in flight have %g s", self._drain_s)
        in_flight = bool(self.server_state.tasks)
        return stopping and not (in_flight and time.monotonic() < self._drain_until)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the listeners and stop the app; what is still in flight has what is left of the time."""
        left_s = min(self._drain_s, max(0.0, self._drain_until - time.monotonic()))
        self.config.timeout_graceful_shutdown = math.ceil(left_s)
        await super().shutdown(sockets)


def server_config(app: FastAPI, settings: Settings, log_level: str = "info") -> uvicorn.Config:
    """What uvicorn is told, wherever it is started: by the command, and by tests."""
    startup: Startup = app.state.startup
    limits = ConnectionLimits.of(settings, allowed_connections(settings.max_connections))
    return GuardedConfig(
        app,
        Connections(limits, startup.metrics),
        host=settings.host,
        port=settings.port,
        log_level=log_level,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # ours are read by ForwardedMiddleware, and not from whom FORWARDED_ALLOW_IPS names
        timeout_keep_alive=15,
    )


def allowed_connections(wanted: int) -> int:
    """As many connections as wanted, or as the system lets a process have; each takes one of its open files."""
    needed = wanted + SPARE_CONNECTIONS + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    if files == needed:
        return wanted
    allowed = max(1, files - SPARE_CONNECTIONS - OTHER_FILES)
    log.warning(
        "%d connections at most instead of %d: this process may open %d files", allowed, wanted, files
    )
    return allowed


def run_server(settings: Settings) -> int:
    """Serve until told to stop, or until it turns out that it cannot be started; the exit status."""
    try:
        app = create_app(settings)
    except CannotStart as error:
        log.error("cannot start: %s", error)
        return 2
    startup: Startup = app.state.startup
    config = server_config(app, settings)
    server = DrainingServer(config, startup, app.state.access, settings.drain_seconds)
    try:
        server.run()
    except SystemExit:  # uvicorn has said why: the address is taken
        return 1
    if startup.failure is not None:
        return 2 if isinstance(startup.failure, CannotStart) else 1
    return 0 if server.started else 1
