"""The HTTP server process: uvicorn, told to drain before it stops."""

from __future__ import annotations

import sys
from types import FrameType

import uvicorn

from service.api.app import create_app
from service.settings import Settings


class DrainingServer(uvicorn.Server):
    """Uvicorn that first tells the app it is draining, so that `/readyz` says no while requests still finish.

    A second signal ends at once.
    """

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Note a signal to stop."""
        engine = getattr(self.config.app.state, "engine", None)  # type: ignore[union-attr]  # ours is always an app
        if engine is not None:
            engine.draining = True
        super().handle_exit(sig, frame)


def run_server(settings: Settings) -> int:
    """Serve until told to stop; the exit status."""
    config = uvicorn.Config(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_level="info",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        timeout_keep_alive=15,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = DrainingServer(config)
    try:
        server.run()
    except ValueError as error:  # a device that is not there
        print(f"backbone-service: {error}", file=sys.stderr)  # noqa: T201 - the terminal is the audience
        return 2
    return 0 if server.started else 1
