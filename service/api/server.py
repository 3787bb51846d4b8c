"""The HTTP server process: uvicorn, told to drain before it stops."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from service.api.access import Access
from service.api.app import create_app
from service.api.connections import SPARE_CONNECTIONS, ConnectionLimits, Connections, GuardedConfig
from service.api.draining import Drain
from service.api.startup import Startup
from service.errors import CannotStart
from service.settings import Settings

# Open files of a process that are no connections: libraries, checkpoints, caches, the engines' own.
OTHER_FILES = 200
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
LINGER_S = 0.1  # who has connected before the port is closed is still answered
# Linux's IP_MINTTL and IPV6_MINHOPCOUNT: packets with fewer hops left are dropped. Systems begin with 64 or 128.
LEAST_HOPS_LEFT = {socket.AF_INET: (socket.IPPROTO_IP, 21), socket.AF_INET6: (socket.IPPROTO_IPV6, 73)}
MOST_HOPS = 255
SWITCH_INTERVAL_S = 0.001  # 5 ms by default
LAST_WORDS_S = 1  # for replies to those who were cut off
STOP_S = 5.0  # for the engine's threads and processes to end
log = logging.getLogger("service.server")


class DrainingServer(uvicorn.Server):
    """Uvicorn that is still there for who comes while it drains, and has ended when it said it would.

    After SIGTERM it serves on for the delay: `/readyz` says no, and every reply closes its connection. Then it still
    listens, but new requests are answered 503, until what is in flight is finished or its time is up. SIGINT is a
    person at a terminal, whom no load balancer waits for: there is no delay. A second signal ends the process at once.

    Args:
        delay_s: seconds to serve on after SIGTERM.
        finish_s: seconds for what is in flight then.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        startup: Startup,
        access: Access,
        drain: Drain,
        *,
        delay_s: float,
        finish_s: float,
    ) -> None:
        super().__init__(config)
        self._startup = startup
        self._access = access
        self._drain = drain
        self._delay_s = delay_s
        self._finish_s = finish_s
        self._refuse_at = self._end_at = math.inf
        self._is_told = False
        self._bound = _ExitBound()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but a stop that was asked for and went well is not raised again: the exit status is 0."""
        with super().capture_signals(), self._access.reading_keys_on_hangup():
            try:
                yield
            finally:
                self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the next signal is the system's to handle, whatever this process is busy with."""
        self._drain.leave()
        is_served = self._startup.now is not None  # else there is nothing to serve on with
        self._begin_to_end(self._delay_s if sig == signal.SIGTERM and is_served else 0.0)
        for stop_signal in STOP_SIGNALS:
            # the system ends no process 1, as a container's only process is, unless it handles the signal itself
            signal.signal(stop_signal, _end_at_once if os.getpid() == 1 else signal.SIG_DFL)
        super().handle_exit(sig, frame)

    def _begin_to_end(self, delay_s: float) -> None:
        self._refuse_at = time.monotonic() + delay_s
        self._end_at = self._refuse_at + self._finish_s
        status = 0 if self._startup.failure is None else 1
        self._bound.begin(delay_s + self._finish_s + STOP_S, status)

    async def on_tick(self, counter: int) -> bool:
        """Whether to leave the main loop: told to stop, and nothing in flight or no time left for it."""
        if self._startup.failure is not None and not self.should_exit:
            self.should_exit = True
            self._begin_to_end(0.0)
        return await super().on_tick(counter) and self._is_finished()

    def _is_finished(self) -> bool:
        now = time.monotonic()
        if not self._is_told:  # a signal handler must not log
            self._is_told = True
            delay_s = max(0.0, self._refuse_at - now)
            log.info("draining: served for %.3g s more, then finished in %g s", delay_s, self._finish_s)
        if now < self._refuse_at:
            return False
        self._startup.give_up()
        return not self._drain.in_flight or now >= self._end_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the port, and stop the app; what is still in flight has what is left of the time."""
        for server in self.servers:
            for listener in server.sockets:
                _let_nobody_connect(listener)
        await asyncio.sleep(LINGER_S)
        for server in self.servers:
            server.close()
        if self.server_state.tasks:
            await asyncio.wait(self.server_state.tasks, timeout=max(0.0, self._end_at - time.monotonic()))
        self._drain.cut_off()
        self.config.timeout_graceful_shutdown = LAST_WORDS_S
        await super().shutdown(sockets)


def server_config(app: FastAPI, settings: Settings, log_level: str | None = None) -> uvicorn.Config:
    """What uvicorn is told, wherever it is started: by the command, and by tests."""
    startup: Startup = app.state.startup
    limits = ConnectionLimits.of(settings, allowed_connections(settings.max_connections))
    return GuardedConfig(
        app,
        Connections(limits, startup.metrics),
        host=settings.host,
        port=settings.port,
        log_config=None,  # its lines go where ours go, in the same form
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


def _let_nobody_connect(listener: socket.socket) -> None:
    """Have the system ignore who wants to connect, so that the port can be closed on nobody.

    Closing resets the connections that were made and not yet accepted, with the requests on them. Who is ignored asks
    again after a second, as TCP does, and finds the port closed before anything was sent. A socket filter would do it
    too, but wants CAP_NET_ADMIN on some kernels.
    """
    if sys.platform == "linux":
        level, option = LEAST_HOPS_LEFT[listener.family]
        listener.setsockopt(level, option, MOST_HOPS)


class _ExitBound:
    """Ends the process where its end takes longer than was promised: a thread that hangs cannot be cancelled."""

    def __init__(self) -> None:
        self._told = threading.Event()
        self._bound_s, self._status = 0.0, 0
        threading.Thread(target=self._watch, name="exit-bound", daemon=True).start()

    def begin(self, bound_s: float, status: int) -> None:
        """From now on the process has so many seconds; may be called by a signal handler."""
        self._bound_s, self._status = bound_s, status
        self._told.set()

    def _watch(self) -> None:
        self._told.wait()
        time.sleep(self._bound_s)
        log.error("something did not end within %g s; it is left behind", self._bound_s)
        logging.shutdown()
        os._exit(self._status)


def _end_at_once(sig: int, _frame: FrameType | None) -> None:
    os._exit(128 + sig)


def run_server(settings: Settings) -> int:
    """Serve until told to stop, or until it turns out that it cannot be started; the exit status.

    The process is expected to end then: seconds after what was asked for, it is ended.
    """
    try:
        app = create_app(settings)
    except CannotStart as error:
        log.error("cannot start: %s", error)
        return 2
    # The event loop waits for so long for the interpreter whenever a thread is at work in Python.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    startup: Startup = app.state.startup
    server = DrainingServer(
        server_config(app, settings),
        startup,
        app.state.access,
        app.state.drain,
        delay_s=settings.drain_delay,
        finish_s=settings.drain_seconds,
    )
    try:
        server.run()
    except SystemExit:  # uvicorn has said why: the address is taken
        return 1
    if startup.failure is not None:
        return 2 if isinstance(startup.failure, CannotStart) else 1
    return 0 if server.started else 1
