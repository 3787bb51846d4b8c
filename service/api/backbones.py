"""`GET /backbones`, `GET /backbones/{type}`, `POST /backbones/inspect`: what can be asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Path, Query
from starlette.requests import Request
from starlette.responses import Response

from service.api.bodies import read_json_object
from service.api.forwarded import address
from service.api.openapi import INSPECT_OPERATION, INSPECT_REPLY, TYPE_REPLY, TYPES_REPLY
from service.api.reply import json_reply
from service.api.state import deadline_of, engine_of, name_of, visitor_of, while_connected
from service.errors import InvalidConfig
from service.runtime.threads import until

if TYPE_CHECKING:
    from service.runtime.engine import Engine

router = APIRouter(tags=["backbones"])
PAGES = "/backbones/"
MAX_PAGE = 2000
MAX_SIDE = 8192


@router.get("/backbones", summary="List the backbone types", responses=TYPES_REPLY, response_class=Response)
async def get_backbones(
    request: Request,
    scope: Annotated[
        str, Query(max_length=64, description="only this scope: mmpretrain, timm, torchvision, …")
    ] = "",
    search: Annotated[
        str, Query(max_length=128, description="words that the name or summary must contain")
    ] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE, description="types a page")] = 100,
    cursor: Annotated[str, Query(max_length=128, description="`next` of the page before")] = "",
) -> Response:
    """The types in the order of their names, a page at a time."""
    engine = await engine_of(request)
    from service.runtime.inspect import list_types  # with torch, which the engine has imported by now

    pages = address(request, PAGES)
    return json_reply(list_types(engine.planner, scope, search, limit, cursor, pages))


@router.get(
    "/backbones/{type}", summary="Describe one backbone type", responses=TYPE_REPLY, response_class=Response
)
async def get_backbone(
    request: Request,
    type: Annotated[
        str,
        Path(
            description="a type of `GET /backbones`",
            openapi_examples={
                "timm": {"value": "timm.resnet18"},
                "OpenMMLab": {"value": "mmpretrain.ResNet"},
            },
        ),
    ],
) -> Response:
    """The JSON Schema of its parameters, its named architectures, its indices, and an example config."""
    engine = await engine_of(request)
    from service.runtime.inspect import type_page

    page = engine.planning(name_of(request), type_page, engine.planner, type, address(request, PAGES))
    async with until(deadline_of(request)):
        return json_reply(await page)


@router.post(
    "/backbones/inspect",
    summary="Describe what a config would build",
    openapi_extra=INSPECT_OPERATION,
    responses=INSPECT_REPLY,
    response_class=Response,
)
async def post_inspect(request: Request) -> Response:
    """Levels, parameters, bytes and frozen names of a config; no weights are made and no image is needed."""
    engine = await engine_of(request)
    asker = name_of(request), visitor_of(request).take_new_model
    async with until(deadline_of(request)):
        body = await read_json_object(request, ("backbone", "neck", "input_size"), required="backbone")
        size = _input_size(body.get("input_size"))
        found = _inspected(engine, asker, body["backbone"], body.get("neck"), size)
        return json_reply(await while_connected(request, found))


async def _inspected(
    engine: Engine,
    asker: tuple[str, Callable[[], None]],
    backbone: Any,
    neck: Any,
    size: tuple[int, int] | None,
) -> dict[str, Any]:
    """What `asker` gets: the name that it takes turns by, and what is called where the config is new."""
    from service.runtime.inspect import inspection

    name, on_new = asker
    plan = await engine.plan(name, backbone, neck, on_new=on_new)
    return await engine.planning(name, inspection, engine.planner, plan, size)


def _input_size(raw: Any) -> tuple[int, int] | None:
    if raw is None:
        return None
    size = [raw, raw] if isinstance(raw, int) else raw
    sound = isinstance(size, list) and len(size) == 2 and all(type(side) is int for side in size)
    if not sound or not all(1 <= side <= MAX_SIDE for side in size):
        raise InvalidConfig("#/input_size", f"must be [height, width] in pixels, each 1 to {MAX_SIDE}")
    return size[0], size[1]
