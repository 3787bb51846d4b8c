"""`GET /configs`, `GET /configs/{name}`: the named configs of the config directory."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from service.api.forwarded import address
from service.api.openapi import CONFIG_REPLY, CONFIGS_REPLY
from service.api.reply import json_reply
from service.api.state import engine_of

router = APIRouter(tags=["configs"])


@router.get("/configs", summary="List the named configs", responses=CONFIGS_REPLY, response_class=Response)
async def get_configs(request: Request) -> Response:
    """The names that `backbone` may be instead of an object."""
    engine = await engine_of(request)
    names = await asyncio.to_thread(engine.planner.catalogue.names)
    return json_reply(
        {"configs": [{"name": name, "href": address(request, f"/configs/{name}")} for name in names]}
    )


@router.get(
    "/configs/{name:path}", summary="Show one named config", responses=CONFIG_REPLY, response_class=Response
)
async def get_config(
    request: Request,
    name: Annotated[
        str,
        Path(description="a name of `GET /configs`", openapi_examples={"named": {"value": "resnet50_c5"}}),
    ],
) -> Response:
    """The config as its file has it (Python as text), and as it is with its bases merged in.

    Of an OpenMMLab model's whole config that is its backbone, neck and preprocessing; `notes` say what is done
    differently here.
    """
    engine = await engine_of(request)
    config = await asyncio.to_thread(engine.planner.catalogue.load, name)
    shown = {"name": config.name, "as_written": config.as_written, "resolved": config.resolved()}
    return json_reply({**shown, "notes": list(config.notes)} if config.notes else shown)
