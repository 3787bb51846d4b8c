"""The app: where everything is put together. Nothing happens at import."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.telemetry import TelemetryConfig
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from service.api import backbones, configs, docs, features, health, models
from service.api.access import Access, AccessMiddleware
from service.api.compression import CompressionMiddleware
from service.api.draining import Drain
from service.api.entrance import EntranceMiddleware
from service.api.errors import (
    on_crash,
    on_http_exception,
    on_memory_error,
    on_service_error,
    on_validation_error,
)
from service.api.forwarded import ForwardedMiddleware, PrefixMiddleware
from service.api.limits import BodyLimits, LimitsMiddleware
from service.api.middleware import ServiceMiddleware
from service.api.openapi import TAGS, DescribedApp, operation_id
from service.api.startup import Startup
from service.errors import ServiceError
from service.metrics import Metrics
from service.settings import Settings
from service.spans import Spans
from service.version import service_version

if TYPE_CHECKING:
    from service.runtime.engine import Engine

DESCRIPTION = """\
Turns images into the features of vision backbones. Send a backbone config, spelled as OpenMMLab, timm or torchvision
spell it, and an image to `POST /features`; `GET /backbones` lists what can be asked for, and
`POST /backbones/inspect` says what a config would give. Errors are `application/problem+json`.
"""

# FastAPI's own spans and logs have the path and query of a request, and what crashed with the client's values.
NO_TELEMETRY: TelemetryConfig = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}


def create_app(settings: Settings, engine: Engine | None = None) -> FastAPI:
    """The ASGI app. It listens at once; its engine is made meanwhile, and requests that come early wait for it.

    Args:
        settings: everything an operator can set.
        engine: one made elsewhere, for embedding; otherwise the app makes and stops its own.

    Raises:
        CannotStart: a key cannot be used, or spans are asked for and cannot be sent.
    """
    metrics = Metrics() if engine is None else engine.metrics
    spans = Spans.from_environment() if settings.tracing else None

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        startup: Startup = app.state.startup
        startup.begin()
        try:
            yield
        finally:
            await startup.stop()
            if spans is not None:
                await asyncio.to_thread(spans.stop)

    app = DescribedApp(
        title="backbone-service",
        version=service_version(),
        description=DESCRIPTION,
        lifespan=lifespan,
        openapi_tags=TAGS,
        generate_unique_id_function=operation_id,
        docs_url=None,
        redoc_url=None,
        telemetry=NO_TELEMETRY,
        redirect_slashes=False,  # the address of a redirect would be made of the client's own Host header
    )
    app.state.access = Access(settings, metrics)
    app.state.drain = drain = Drain()
    app.state.startup = Startup(settings, metrics, drain, engine)
    for routes in (features, backbones, configs, models, health, docs):
        app.include_router(routes.router)
    docs.mount_assets(app)
    _add_error_handlers(app)
    app.add_middleware(PrefixMiddleware)
    app.add_middleware(CompressionMiddleware)
    app.add_middleware(LimitsMiddleware, limits=BodyLimits.of(settings), metrics=metrics)
    app.add_middleware(AccessMiddleware, access=app.state.access)
    app.add_middleware(
        EntranceMiddleware,
        drain=drain,
        request_timeout_s=settings.request_timeout,
        max_requests=settings.max_requests,
    )
    app.add_middleware(ServiceMiddleware, metrics=metrics, spans=spans)
    app.add_middleware(
        ForwardedMiddleware, proxies=settings.forwarded_allow_ips, root_path=settings.root_path
    )
    return app


def _add_error_handlers(app: FastAPI) -> None:
    app.add_exception_handler(ServiceError, on_service_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(MemoryError, on_memory_error)
    app.add_exception_handler(Exception, on_crash)


async def _on_disconnect(_request: Request, _error: Exception) -> Response:
    """Nobody reads this; 499 is what access logs call it."""
    return Response(status_code=499)
