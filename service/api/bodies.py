"""The three ways into `POST /features`: multipart parts, one JSON object, or a raw body with a query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import Fault, InvalidConfig, MalformedBody, TooLarge, UnsupportedMedia
from service.protocol.request import (
    FeatureRequest,
    ImageRef,
    decode_base64,
    parse_json_body,
    parse_text_parts,
    read_json,
)
from service.settings import Settings
from service.validation import pointer_to

TEXT_PARTS = tuple(field.alias or name for name, field in FeatureRequest.model_fields.items())
MAX_TEXT_BYTES = 256 * 1024
MAX_PARTS = 2048
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
NPY_TYPES = ("application/x-npy", "application/npy")


@dataclass(frozen=True)
class Intake:
    """One request as it came in: its parameters, and encoded images or one `.npy`."""

    parameters: FeatureRequest
    images: tuple[bytes, ...]
    tensor: bytes | None


async def read_features_request(request: Request, settings: Settings) -> Intake:
    """Read the body of `POST /features`.

    Raises:
        UnsupportedMedia, MalformedBody, InvalidConfig, TooLarge: what is wrong with it.
    """
    media_type = media_type_of(request)
    if media_type in READERS:
        _refuse_query(request)
    reader = READERS.get(media_type) or (_read_raw if _is_raw(media_type) else None)
    if reader is None:
        served = ", ".join((*READERS, "image/*", *NPY_TYPES))
        raise UnsupportedMedia(
            f"bodies of type {media_type[:80] or 'none'!r} are not served; send one of {served}"
        )
    intake = await reader(request)
    if len(intake.images) > settings.max_images:
        raise TooLarge(f"{len(intake.images)} images exceed {settings.max_images} in one request")
    if (intake.tensor is None) == (not intake.images):
        raise MalformedBody("send images or one tensor", faults=[Fault("#/image", "images or one tensor")])
    return intake


def media_type_of(request: Request) -> str:
    """The content type without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _is_raw(media_type: str) -> bool:
    return media_type.startswith("image/") or media_type in (*NPY_TYPES, "application/octet-stream")


def _refuse_charset(request: Request) -> None:
    """Refuse parts in another charset: Python knows some that fail, or that make no text."""
    _, parameters = parse_options_header(request.headers.get("content-type"))
    charset = parameters.get(b"charset", b"utf-8").lower()
    if charset not in CHARSETS:
        raise UnsupportedMedia("multipart bodies are served in the charset utf-8 only")


def _refuse_query(request: Request) -> None:
    """Refuse keys in the query of a body that carries its own: they would be ignored without a word."""
    for key in request.query_params:
        raise InvalidConfig(f"#/{key[:64]}", "goes into the body; the query is for raw bodies")


async def _read_multipart(request: Request) -> Intake:
    _refuse_charset(request)
    try:
        form = await request.form(
            max_files=MAX_PARTS, max_fields=len(TEXT_PARTS) * 2, max_part_size=MAX_TEXT_BYTES
        )
    except HTTPException as error:
        raise MalformedBody(f"the multipart body cannot be read: {error.detail}") from error
    try:
        return await _intake_of_form(form)
    finally:
        await form.close()


async def _intake_of_form(form: FormData) -> Intake:
    images: list[bytes] = []
    tensors: list[bytes] = []
    texts: dict[str, str] = {}
    for name, part in form.multi_items():
        if name in ("image", "tensor"):
            if part == "":  # an unfilled field of a form
                continue
            (images if name == "image" else tensors).append(await _file_of(name, part))
        elif name not in TEXT_PARTS:
            known = ", ".join(("image", "tensor", *TEXT_PARTS))
            raise InvalidConfig(f"#/{name[:64]}", f"unknown part; known: {known}")
        elif name in texts:
            raise InvalidConfig(f"#/{name}", "the part is there twice")
        else:
            texts[name] = await _text_of(name, part)
    if len(tensors) > 1:
        raise TooLarge(f"{len(tensors)} tensors exceed one in one request")
    return Intake(parse_text_parts(texts), tuple(images), tensors[0] if tensors else None)


async def _file_of(name: str, part: UploadFile | str) -> bytes:
    if isinstance(part, str):
        raise MalformedBody(f"the part {name} must be a file: curl -F {name}=@FILE")
    return await part.read()


async def _text_of(name: str, part: UploadFile | str) -> str:
    if isinstance(part, str):
        return part
    data = await part.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise TooLarge(f"the part {name} exceeds {MAX_TEXT_BYTES:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the part {name} is not text in UTF-8") from error


async def _read_json_body(request: Request) -> Intake:
    data = await request.body()
    return await asyncio.to_thread(_intake_of_json, data)


def _intake_of_json(data: bytes) -> Intake:
    asked = parse_json_body(data)
    return Intake(asked, tuple(_image_of(image, index) for index, image in enumerate(asked.images)), None)


def _image_of(image: ImageRef, index: int) -> bytes:
    if image.base64 is None:
        detail = "fetching image URLs is off on this server; send the image as base64"
        raise InvalidConfig(f"#/images/{index}/url", detail)
    return decode_base64(image.base64, pointer=f"#/images/{index}/base64")


async def _read_raw(request: Request) -> Intake:
    parameters = parse_text_parts(_single_values(request))
    body = await request.body()
    if media_type_of(request) in NPY_TYPES:
        return Intake(parameters, (), body)
    return Intake(parameters, (body,), None)


def _single_values(request: Request) -> Mapping[str, str]:
    values: dict[str, str] = {}
    for key, value in request.query_params.multi_items():
        if key not in TEXT_PARTS:
            raise InvalidConfig(f"#/{key[:64]}", f"unknown key of the query; known: {', '.join(TEXT_PARTS)}")
        if key in values:
            raise InvalidConfig(f"#/{key}", "the key is there twice")
        values[key] = value
    return values


READERS: Mapping[str, Callable[[Request], Awaitable[Intake]]] = {
    "multipart/form-data": _read_multipart,
    "application/json": _read_json_body,
}


async def read_json_object(request: Request, keys: tuple[str, ...], *, required: str) -> dict[str, Any]:
    """The body of a JSON route: an object with these keys and no others.

    Raises:
        UnsupportedMedia, MalformedBody, InvalidConfig: what is wrong with it.
    """
    media_type = media_type_of(request)
    if media_type != "application/json":
        raise UnsupportedMedia(f"the body must be application/json, not {media_type[:80] or 'untyped'}")
    body = read_json(await request.body())
    if not isinstance(body, dict):
        raise InvalidConfig("#", "the body must be an object")
    unknown = [key for key in body if key not in keys]
    if unknown:
        raise InvalidConfig(pointer_to("#", unknown[0]), f"unknown key; known: {', '.join(keys)}")
    if required not in body:
        raise InvalidConfig(f"#/{required}", "is required")
    return body
