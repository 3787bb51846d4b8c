"""`POST /features`: images and a backbone config in, multi-scale features out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from service.api.bodies import Intake, read_features_request
from service.api.openapi import FEATURES_OPERATION, FEATURES_REPLY
from service.api.state import client, engine_of, while_connected
from service.errors import TooLarge
from service.protocol.encode import Chunk, EncodedReply, ReplyOptions, check_levels, encode, reply_bytes
from service.protocol.negotiate import JSON, negotiate
from service.protocol.reply import FeatureReply
from service.runtime.engine import Engine, Shapes
from service.runtime.query import FeatureQuery

router = APIRouter(tags=["features"])


@router.post(
    "/features",
    summary="Compute the features of images",
    dependencies=[Depends(client)],
    openapi_extra=FEATURES_OPERATION,
    responses=FEATURES_REPLY,
    response_class=Response,
)
async def post_features(request: Request) -> Response:
    """One level for each index asked for, for one image or more, from any backbone of `GET /backbones`.

    Send the image as a multipart part, as base64 in JSON, or as the raw body with the rest in the query;
    `Accept` chooses the form of the reply.
    """
    engine = engine_of(request)
    media_type = negotiate(request.headers.get("accept"))
    intake = await read_features_request(request, engine.settings)
    return await while_connected(
        request, _answer(request, engine, intake, media_type, _options(intake, media_type))
    )


def _options(intake: Intake, media_type: str) -> ReplyOptions:
    """How to write the reply: a binary one is always tensors, JSON is shapes unless asked."""
    asked = intake.parameters
    returns = (asked.returns or "shapes") if media_type == JSON else "tensors"
    return ReplyOptions(returns, asked.encoding)


async def _answer(
    request: Request, engine: Engine, intake: Intake, media_type: str, options: ReplyOptions
) -> Response:
    prepared = await engine.prepare(_query(intake), extra=f"{media_type} {options}")
    headers = {"ETag": f'W/"{prepared.fingerprint}"', "X-Model-ID": prepared.model_id, "Vary": "Accept"}
    if _matches(request.headers.get("if-none-match"), prepared.fingerprint):
        return Response(status_code=304, headers=headers)

    def refuse_reply(shapes: Shapes, names: Sequence[str]) -> None:
        check_levels(names, media_type)
        expected = reply_bytes(shapes, intake.parameters.dtype, media_type, options.returns, options.encoding)
        if expected > engine.settings.max_reply_bytes:
            limit = engine.settings.max_reply_bytes
            raise TooLarge(f"the reply would be about {expected:,} bytes; the limit is {limit:,}")

    reply = await engine.extract(prepared, refuse_reply)
    encoded = await engine.encode(lambda: encode(media_type, reply, options))
    headers |= {"Server-Timing": _server_timing(reply, encoded), "Content-Length": str(encoded.size)}
    return StreamingResponse(_chunks(encoded), headers={**headers, **encoded.headers}, media_type=media_type)


def _query(intake: Intake) -> FeatureQuery:
    asked = intake.parameters
    return FeatureQuery(
        backbone=asked.backbone,
        images=intake.images,
        tensor=intake.tensor,
        neck=asked.neck,
        preprocess=asked.preprocess,
        precision=asked.precision,
        dtype=asked.dtype,
        pool=asked.pool,
        normalize=asked.normalize,
    )


def _matches(if_none_match: str | None, fingerprint: str) -> bool:
    """Weak comparison (RFC 9110, section 8.8.3.2)."""
    if if_none_match is None:
        return False
    given = {tag.strip().removeprefix("W/").strip('"') for tag in if_none_match[:4096].split(",")}
    return fingerprint in given or "*" in given


def _server_timing(reply: FeatureReply, encoded: EncodedReply) -> str:
    stages = {**reply.timings.describe(), "encode": encoded.encode_ms}
    return ", ".join(f"{stage};dur={elapsed_ms:.2f}" for stage, elapsed_ms in stages.items())


async def _chunks(encoded: EncodedReply) -> AsyncIterator[Chunk]:
    """The body in pieces, views of the arrays where it is tensors."""
    for chunk in encoded.chunks:
        yield chunk
