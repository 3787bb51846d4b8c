"""The three ways into `POST /features`: multipart parts, one JSON object, or a raw body with a query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ParamSpec, TypeVar
from urllib.parse import parse_qsl

from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from service.api.forms import FormLimits, FormPart, parse_form
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
FORM_LIMITS = FormLimits(max_files=2048, max_texts=len(TEXT_PARTS) * 2, max_text_bytes=MAX_TEXT_BYTES)
# Below it, reading a body takes less time than handing it to another thread.
QUICK_BYTES = 64 * 1024
# Clients repeat their parameters: those of this many requests are kept as they were understood. A JSON of 4 kB is
# objects of 0.1 MB at worst, so what is kept stays under 32 MB whatever is sent.
KEPT_PARAMETERS = 256
KEPT_CHARS = 4096
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
NPY_TYPES = ("application/x-npy", "application/npy")

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Intake:
    """One request as it came in: its parameters, and encoded images or one `.npy`.

    An image that has yet to be fetched is empty, and its URL is in `urls` under its index.
    """

    parameters: FeatureRequest
    images: tuple[bytes, ...]
    tensor: bytes | None
    urls: Mapping[int, str] = field(default_factory=dict)


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


def _refuse_query(request: Request) -> None:
    """Refuse keys in the query of a body that carries its own: they would be ignored without a word."""
    for key, _ in _query_pairs(request.scope["query_string"]):
        raise InvalidConfig(pointer_to("#", key), "goes into the body; the query is for raw bodies")


async def _off_the_loop(
    size_bytes: int, function: Callable[P, T], *arguments: P.args, **keywords: P.kwargs
) -> T:
    """The result of a function that takes as long as the body is large; here if it is small, else on a thread."""
    if size_bytes <= QUICK_BYTES:
        return function(*arguments, **keywords)
    return await asyncio.to_thread(function, *arguments, **keywords)


async def _read_multipart(request: Request) -> Intake:
    boundary = _boundary(request)
    body = await request.body()
    return _intake_of_form(await _off_the_loop(len(body), parse_form, body, boundary, FORM_LIMITS))


def _boundary(request: Request) -> bytes:
    """The boundary of a form. Charsets other than UTF-8 are refused: Python knows some that make no text."""
    _, parameters = parse_options_header(request.headers.get("content-type"))
    if parameters.get(b"charset", b"utf-8").lower() not in CHARSETS:
        raise UnsupportedMedia("multipart bodies are served in the charset utf-8 only")
    if not parameters.get(b"boundary"):
        raise MalformedBody("the multipart body cannot be read: Missing boundary in multipart.")
    return parameters[b"boundary"]


def _intake_of_form(parts: list[FormPart]) -> Intake:
    images: list[bytes] = []
    tensors: list[bytes] = []
    texts: dict[str, str] = {}
    for part in parts:
        if part.name in ("image", "tensor"):
            if part.is_file or part.data:  # an unfilled field of a form is an empty text
                (images if part.name == "image" else tensors).append(_file_of(part))
        elif part.name not in TEXT_PARTS:
            known = ", ".join(("image", "tensor", *TEXT_PARTS))
            raise InvalidConfig(pointer_to("#", part.name), f"unknown part; known: {known}")
        elif part.name in texts:
            raise InvalidConfig(f"#/{part.name}", "the part is there twice")
        else:
            texts[part.name] = _text_of(part)
    if len(tensors) > 1:
        raise TooLarge(f"{len(tensors)} tensors exceed one in one request")
    return Intake(_parameters(tuple(texts.items())), tuple(images), tensors[0] if tensors else None)


def _file_of(part: FormPart) -> bytes:
    if not part.is_file:
        raise MalformedBody(f"the part {part.name} must be a file: curl -F {part.name}=@FILE")
    return part.data


def _text_of(part: FormPart) -> str:
    if len(part.data) > MAX_TEXT_BYTES:
        raise TooLarge(f"the part {part.name} exceeds {MAX_TEXT_BYTES:,} bytes")
    try:
        return part.data.decode()
    except UnicodeDecodeError as error:
        raise MalformedBody(f"the part {part.name} is not text in UTF-8") from error


def _parameters(texts: tuple[tuple[str, str], ...]) -> FeatureRequest:
    """The request that text parts or a query make."""
    if sum(len(text) for _, text in texts) > KEPT_CHARS:
        return parse_text_parts(dict(texts))
    return _kept_parameters(texts)


@lru_cache(maxsize=KEPT_PARAMETERS)
def _kept_parameters(texts: tuple[tuple[str, str], ...]) -> FeatureRequest:
    # Frozen, and nothing changes the configs in it: a plan is made from a copy.
    return parse_text_parts(dict(texts))


async def _read_json_body(request: Request) -> Intake:
    data = await request.body()
    return await _off_the_loop(len(data), _intake_of_json, data)


def _intake_of_json(data: bytes) -> Intake:
    asked = parse_json_body(data)
    images = tuple(_image_of(image, index) for index, image in enumerate(asked.images))
    urls = {index: image.url for index, image in enumerate(asked.images) if image.url is not None}
    return Intake(asked, images, None, urls)


def _image_of(image: ImageRef, index: int) -> bytes:
    if image.base64 is None:
        return b""
    return decode_base64(image.base64, pointer=f"#/images/{index}/base64")


async def _read_raw(request: Request) -> Intake:
    parameters = _parameters_of_query(request.scope["query_string"])
    body = await request.body()
    if media_type_of(request) in NPY_TYPES:
        return Intake(parameters, (), body)
    return Intake(parameters, (body,), None)


def _parameters_of_query(query: bytes) -> FeatureRequest:
    return _read_query(query) if len(query) > KEPT_CHARS else _kept_query(query)


@lru_cache(maxsize=KEPT_PARAMETERS)
def _kept_query(query: bytes) -> FeatureRequest:
    return _read_query(query)


def _read_query(query: bytes) -> FeatureRequest:
    values: dict[str, str] = {}
    for key, value in _query_pairs(query):
        if key not in TEXT_PARTS:
            known = ", ".join(TEXT_PARTS)
            raise InvalidConfig(pointer_to("#", key), f"unknown key of the query; known: {known}")
        if key in values:
            raise InvalidConfig(f"#/{key}", "the key is there twice")
        values[key] = value
    return parse_text_parts(values)


def _query_pairs(query: bytes) -> list[tuple[str, str]]:
    return parse_qsl(query.decode("latin-1"), keep_blank_values=True) if query else []


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
