"""`POST /features`: images and a backbone config in, multi-scale features out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from service.api.bodies import Intake, read_features_request
from service.api.compression import coding_of
from service.api.headers import header
from service.api.openapi import FEATURES_OPERATION, FEATURES_REPLY
from service.api.reply import ChunkedReply
from service.api.routes import LeanRoute
from service.api.state import deadline_of, engine_of, name_of, visitor_of, while_connected
from service.errors import TooLarge
from service.protocol.coding import AS_IT_IS, IDENTITY
from service.protocol.encode import (
    EncodedReply,
    ReplyOptions,
    check_levels,
    encode,
    is_quick,
    reply_bytes,
)
from service.protocol.negotiate import JSON, negotiate
from service.protocol.reply import FeatureReply
from service.runtime.threads import until

if TYPE_CHECKING:
    from service.runtime.admission import Shapes, WeighReply
    from service.runtime.engine import Engine
    from service.runtime.query import FeatureQuery, Prepared

VARY = "Accept, Accept-Encoding"
router = APIRouter(tags=["features"], route_class=LeanRoute)


@router.post(
    "/features",
    summary="Compute the features of images",
    openapi_extra=FEATURES_OPERATION,
    responses=FEATURES_REPLY,
    response_class=Response,
)
async def post_features(request: Request) -> Response:
    """One level for each index asked for, for one image or more, from any backbone of `GET /backbones`.

    Send the image as a multipart part, as base64 in JSON, or as the raw body with the rest in the query;
    `Accept` chooses the form of the reply.
    """
    engine = await engine_of(request)
    media_type = negotiate(header(request.scope, b"accept").decode("latin-1"))
    async with until(deadline_of(request)):
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
    visitor, query = visitor_of(request), _query(intake, name_of(request))
    deadline, extra = deadline_of(request), f"{media_type} {options}"
    prepared = await engine.prepare(query, deadline, extra=extra, on_new=visitor.take_new_model)
    # Weak: replies that are equal by their tag may differ in their timings and in their content coding.
    headers = {"ETag": f'W/"{prepared.fingerprint}"', "X-Model-ID": prepared.model_id, "Vary": VARY}
    if _matches(header(request.scope, b"if-none-match").decode("latin-1"), prepared.fingerprint):
        return Response(status_code=304, headers=headers)
    if visitor.counts_pixels:
        engine.refuse_long_wait(prepared)  # who is refused for that has spent nothing
        async with until(deadline):
            visitor.take_pixels(await engine.pixels(prepared))

    share = engine.memory.share(prepared.query.client)
    with ExitStack() as held:
        held.callback(share.let_go)
        reply = await engine.extract(prepared, _weigher(engine, intake, media_type, options), share)
        encoded = await _encoded(request, engine, reply, media_type, options)
        engine.observe_encode(encoded.encode_ms / 1000)
        headers |= {"Server-Timing": _server_timing(prepared, reply, encoded), **encoded.headers}
        if encoded.coding != IDENTITY:
            headers["Content-Encoding"] = encoded.coding
        return ChunkedReply(encoded.chunks, headers, media_type, sent=held.pop_all().close)


def _weigher(engine: Engine, intake: Intake, media_type: str, options: ReplyOptions) -> WeighReply:
    """Says how many bytes a reply of some levels has, and refuses one that may not be sent."""
    limit = engine.settings.max_reply_bytes

    def weigh(shapes: Shapes, names: Sequence[str]) -> int:
        check_levels(names, media_type)
        expected = reply_bytes(shapes, intake.parameters.dtype, media_type, options.returns, options.encoding)
        if expected > limit:
            raise TooLarge(f"the reply would be about {expected:,} bytes; the limit is {limit:,}")
        return expected

    return weigh


async def _encoded(
    request: Request, engine: Engine, reply: FeatureReply, media_type: str, options: ReplyOptions
) -> EncodedReply:
    """The body: made here where that takes less than handing it to a thread, which else compresses it too."""
    accepted = coding_of(request)
    # Every HTTP library sends `gzip, deflate` unasked: to take it for a wish would double the time of most replies.
    coding = AS_IT_IS if accepted.is_habit else accepted
    if coding == AS_IT_IS and is_quick(media_type, reply, options):
        return encode(media_type, reply, options)
    async with until(deadline_of(request)):
        return await engine.encode(name_of(request), lambda: encode(media_type, reply, options, coding))


def _query(intake: Intake, client_name: str) -> FeatureQuery:
    from service.runtime.query import FeatureQuery  # with torch, which the engine has imported by now

    asked = intake.parameters
    return FeatureQuery(
        backbone=asked.backbone,
        images=intake.images,
        tensor=intake.tensor,
        urls=intake.urls,
        neck=asked.neck,
        preprocess=asked.preprocess,
        precision=asked.precision,
        dtype=asked.dtype,
        pool=asked.pool,
        normalize=asked.normalize,
        client=client_name,
    )


def _matches(if_none_match: str, fingerprint: str) -> bool:
    """Weak comparison (RFC 9110, section 8.8.3.2)."""
    given = {tag.strip().removeprefix("W/") for tag in if_none_match[:4096].split(",")}
    return f'"{fingerprint}"' in given or "*" in given


def _server_timing(prepared: Prepared, reply: FeatureReply, encoded: EncodedReply) -> str:
    fetch = {"fetch": prepared.fetch_ms} if prepared.query.urls else {}
    stages = {**fetch, **reply.timings.describe(), "encode": encoded.encode_ms}
    return ", ".join(f"{stage};dur={elapsed_ms:.2f}" for stage, elapsed_ms in stages.items())
