"""Refuses what comes while the service is on its way out; probes go on."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from service.api.errors import problem_response
from service.errors import Draining

PROBES = ("/healthz", "/readyz", "/metrics")


class DrainMiddleware:
    """Pure ASGI."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["app"].state.startup.refuses and scope["path"] not in PROBES:
            refusal = problem_response(Draining("the service is shutting down"), scope["request_id"])
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)
