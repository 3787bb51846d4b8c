"""`GET /models`, `POST /models`, `DELETE /models/{id}`: the models in memory."""

from __future__ import annotations

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from service.api.bodies import read_json_object
from service.api.openapi import JSON_REPLY, LOAD_OPERATION
from service.api.reply import json_reply
from service.api.state import client, engine_of, operator

router = APIRouter(tags=["models"])


@router.get(
    "/models",
    summary="List the models in memory",
    dependencies=[Depends(client)],
    responses=JSON_REPLY,
    response_class=Response,
)
async def get_models(request: Request) -> Response:
    """What is loaded, what it takes and when it was last used; the budget; loads under way."""
    return json_reply(engine_of(request).model_list())


@router.post(
    "/models",
    summary="Load a model ahead of its first image",
    status_code=201,
    dependencies=[Depends(operator)],
    openapi_extra=LOAD_OPERATION,
    response_class=Response,
)
async def post_models(request: Request) -> Response:
    """Load and warm what a config builds; 201 when it is there, 200 when it already was."""
    body = await read_json_object(request, ("backbone", "neck", "preprocess"), required="backbone")
    entry, fresh = await engine_of(request).load(body["backbone"], body.get("neck"), body.get("preprocess"))
    return json_reply(
        entry, 201 if fresh else 200, {"Location": f"/models/{entry['id']}", "X-Model-ID": entry["id"]}
    )


@router.delete(
    "/models/{id}",
    summary="Unload a model",
    dependencies=[Depends(operator)],
    responses=JSON_REPLY,
    response_class=Response,
)
async def delete_model(request: Request, id: str) -> Response:
    """Unload a model: at once, or with the request that uses it last."""
    gone = engine_of(request).cache.unload(id)
    return json_reply({"id": id, "state": "unloaded" if gone else "unloading"}, 200 if gone else 202)
