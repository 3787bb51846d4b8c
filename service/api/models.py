"""`GET /models`, `POST /models`, `DELETE /models/{id}`: the models in memory."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path
from starlette.requests import Request
from starlette.responses import Response

from service.api.bodies import read_json_object
from service.api.forwarded import address
from service.api.openapi import LOAD_OPERATION, LOAD_REPLY, MODELS_REPLY, UNLOAD_REPLY
from service.api.reply import json_reply
from service.api.state import deadline_of, engine_of, visitor_of, while_connected
from service.runtime.threads import until

router = APIRouter(tags=["models"])


@router.get(
    "/models",
    summary="List the models in memory",
    responses=MODELS_REPLY,
    response_class=Response,
)
async def get_models(request: Request) -> Response:
    """What is loaded, what it takes and when it was last used; downloads and loads under way; the budget."""
    return json_reply((await engine_of(request)).model_list())


@router.post(
    "/models",
    summary="Load a model ahead of its first image",
    status_code=201,
    openapi_extra=LOAD_OPERATION,
    responses=LOAD_REPLY,
    response_class=Response,
)
async def post_models(request: Request) -> Response:
    """Load and warm what a config builds; 201 when it is there, 200 when it already was."""
    deadline = deadline_of(request)
    async with until(deadline):
        body = await read_json_object(request, ("backbone", "neck", "preprocess"), required="backbone")
    engine = await engine_of(request)
    on_new = visitor_of(request).take_new_model
    load = engine.load(body["backbone"], body.get("neck"), body.get("preprocess"), deadline, on_new)
    entry, fresh = await while_connected(request, load)
    location = address(request, f"/models/{entry['id']}")
    return json_reply(entry, 201 if fresh else 200, {"Location": location, "X-Model-ID": entry["id"]})


@router.delete(
    "/models/{id}",
    summary="Unload a model",
    responses=UNLOAD_REPLY,
    response_class=Response,
)
async def delete_model(
    request: Request,
    id: Annotated[
        str,
        Path(
            description="the id of `GET /models` or X-Model-ID",
            openapi_examples={"id": {"value": "dc44b5df001be2fabf68"}},
        ),
    ],
) -> Response:
    """Unload a model: at once, or with the request that uses it last."""
    gone = (await engine_of(request)).networks.unload(id)
    return json_reply({"id": id, "state": "unloaded" if gone else "unloading"}, 200 if gone else 202)
