"""`GET /healthz`, `/readyz`, `/metrics`, `/version`: for probes and operators."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.openapi import ALIVE_REPLY, METRICS_REPLY, READY_REPLY, VERSION_REPLY
from service.api.reply import json_reply
from service.api.state import engine_of, startup_of
from service.runtime.status import versions

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Is the process alive", responses=ALIVE_REPLY, response_class=Response)
async def get_healthz(request: Request) -> Response:
    """200 while the event loop answers and the device worker, once there is one, makes progress; else 503."""
    fault = startup_of(request).fault()
    return json_reply(
        {"status": "ok"} if fault is None else {"status": "failing", "reason": fault}, 503 if fault else 200
    )


@router.get("/readyz", summary="May it be sent requests", responses=READY_REPLY, response_class=Response)
async def get_readyz(request: Request) -> Response:
    """200 once started and warm and while not draining, else 503 with the reason."""
    reason = startup_of(request).not_ready()
    body = {"status": "ready"} if reason is None else {"status": "not ready", "reason": reason}
    return json_reply(body, 503 if reason else 200, {"Retry-After": "1"} if reason else None)


@router.get("/metrics", summary="Prometheus metrics", responses=METRICS_REPLY, response_class=Response)
async def get_metrics(request: Request) -> Response:
    """Counters in Prometheus' text format."""
    metrics = startup_of(request).metrics
    asked = time.perf_counter()
    await asyncio.sleep(0)  # behind everything that is ready to run
    metrics.loop_lag_seconds.set(time.perf_counter() - asked)
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/version", summary="Versions", responses=VERSION_REPLY, response_class=Response)
async def get_version(request: Request) -> Response:
    """Versions of the service and its libraries, and the device."""
    return json_reply(versions((await engine_of(request)).device))
