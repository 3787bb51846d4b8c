"""What a request to `POST /features` says, whichever of the three ways in it came by."""

from __future__ import annotations

import binascii
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.errors import Fault, InvalidConfig, MalformedBody, TooLarge
from service.validation import invalid, pointer_to

MAX_DEPTH = 32
MAX_VALUES = 10_000
MAX_LIST_ITEMS = 1024
MAX_NAME_CHARS = 256
MAX_CONFIG_CHARS = 256 * 1024
MAX_URL_CHARS = 2048


# --- JSON, bounded ------------------------------------------------------------------------------


def read_json(data: bytes | str, *, pointer: str = "#") -> object:
    """A JSON document of at most 10,000 values, 32 levels and 1,024 items a list (`images` apart).

    Takes milliseconds for any input that a body limit lets through: the marks between values are counted
    before anything is parsed, so a hostile body is never made into objects. Texts and keys may have 262,144
    characters together; those of `images` are the body's limit to count.

    Args:
        data: UTF-8 text; its size is the caller's to limit.
        pointer: where the document is in the request.

    Raises:
        MalformedBody: not JSON, or too many values.
        InvalidConfig: nested too deep or a list too long, with the place.
        TooLarge: too much text.
    """
    if _marks(data) > 2 * MAX_VALUES:
        raise _malformed(pointer, f"the JSON has more than {MAX_VALUES} values")
    try:
        document: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _malformed(pointer, f"not JSON: {_where(error)}") from error
    _check_bounds(document, pointer)
    return document


def _marks(data: bytes | str) -> int:
    """At least the number of values less one: each follows a comma or opens a list or an object."""
    if isinstance(data, str):
        return data.count(",") + data.count("[") + data.count("{")
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _where(error: orjson.JSONDecodeError) -> str:
    """The parser's reason and place; it quotes nothing of the document."""
    return f"{error.msg} at line {error.lineno} column {error.colno}"


def _malformed(pointer: str, detail: str) -> MalformedBody:
    return MalformedBody(f"{pointer}: {detail}", faults=[Fault(pointer, detail)])


def _check_bounds(document: object, pointer: str) -> None:
    """Walk a document without recursion; every value is looked at once."""
    values = chars = 0
    pending: list[tuple[str, int, object]] = [(pointer, 1, document)]
    while pending:
        place, depth, value = pending.pop()
        values += 1
        if values > MAX_VALUES:
            raise _malformed(pointer, f"the JSON has more than {MAX_VALUES} values")
        chars += 0 if place.startswith(f"{pointer}/images/") else _chars(value)
        if chars > MAX_CONFIG_CHARS:
            raise TooLarge(f"{pointer}: more than {MAX_CONFIG_CHARS:,} characters of text")
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidConfig(place, "a number is too large")
        if isinstance(value, dict | list):
            _check_container(value, place, depth, is_images=place == f"{pointer}/images")
            pending.extend((pointer_to(place, key), depth + 1, item) for key, item in _items(value))


def _chars(value: object) -> int:
    """The characters of a text, or of the keys of an object."""
    if isinstance(value, str):
        return len(value)
    return sum(map(len, value)) if isinstance(value, dict) else 0


def _check_container(
    value: dict[str, object] | list[object], place: str, depth: int, *, is_images: bool
) -> None:
    if depth > MAX_DEPTH:
        raise InvalidConfig(place, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list) and len(value) > MAX_LIST_ITEMS and not is_images:
        raise InvalidConfig(place, f"a list of {len(value)} items; the limit is {MAX_LIST_ITEMS}")


def _items(value: dict[str, object] | list[object]) -> Iterator[tuple[str | int, object]]:
    return iter(value.items()) if isinstance(value, dict) else enumerate(value)


# --- the request --------------------------------------------------------------------------------


def _object_or_name(value: object) -> object:
    """One message for a union of two, where pydantic would give one a branch."""
    if isinstance(value, dict) or (isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARS):
        return value
    raise PydanticCustomError(
        "object_or_name", "give an object or a name of 1 to {limit} characters", {"limit": MAX_NAME_CHARS}
    )


ConfigOrName = Annotated[dict[str, Any] | str, BeforeValidator(_object_or_name)]


def _object_list_or_name(value: object) -> object:
    """A list is looked at by its own room; the rest is as for `_object_or_name`."""
    return value if isinstance(value, list) else _object_or_name(value)


NeckOrChain = Annotated[dict[str, Any] | list[Any] | str, BeforeValidator(_object_list_or_name)]


class FeatureRequest(BaseModel):
    """The keys that every way in shares. Configs are left as they came; their own rooms read them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    backbone: ConfigOrName = Field(
        description="A backbone config, or the name of a file of `model_configs/`."
    )
    neck: NeckOrChain | None = Field(
        None, description="A neck config, or a list of them, one behind the other."
    )
    preprocess: ConfigOrName | None = Field(
        None, description="How images become the network's input; the checkpoint's own way without it."
    )
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Precision of the computation."
    )
    returns: Literal["shapes", "tensors"] | None = Field(
        None,
        alias="return",
        description="`shapes` (with min, max, mean, std) or `tensors`; a binary reply always has tensors.",
    )
    dtype: Literal["float32", "float16"] = Field("float32", description="Type of what is returned.")
    pool: Literal["none", "avg", "max", "gem", "cls"] = Field(
        "none", description="Pooling of each level to [n, c]."
    )
    normalize: StrictBool = Field(False, description="L2 over channels, after pooling.")
    encoding: Literal["list", "base64"] = Field("list", description="How JSON spells tensors.")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: object) -> object:
        """Typed clients send null for what they leave out."""
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class ImageRef(BaseModel):
    """One image of a JSON body: exactly one of `base64` and `url`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base64: str | None = Field(None, min_length=1, description="The bytes of an image file.")
    url: str | None = Field(
        None,
        min_length=1,
        max_length=MAX_URL_CHARS,
        description="Where it is fetched from; off until the operator allows hosts.",
    )

    @model_validator(mode="after")
    def _one_of_two(self) -> ImageRef:
        if (self.base64 is None) == (self.url is None):
            raise PydanticCustomError("one_of_two", "give base64 or url: one of the two")
        return self


class JsonFeatureRequest(FeatureRequest):
    """An `application/json` body. How many images there may be is the operator's limit, not checked here."""

    images: tuple[ImageRef, ...] = Field(min_length=1)


def parse_json_body(data: bytes) -> JsonFeatureRequest:
    """The request of an `application/json` body.

    Raises:
        MalformedBody: the body is not a JSON object, or far too large a one.
        InvalidConfig: a key or a value is not valid, with its pointer.
    """
    return _validated(JsonFeatureRequest, _object(read_json(data), "#"))


def parse_text_parts(parts: Mapping[str, str]) -> FeatureRequest:
    """The request of multipart text parts or of a query: each value a plain word or JSON.

    A value is JSON where it starts as an object, a list or a string, and where it is `true`, `false` or
    `null`; anything else is a word. An empty value counts as not given, as a form sends it.

    Raises:
        MalformedBody: a part starts as JSON and is not, with the part's pointer.
        InvalidConfig: a key or a value is not valid, with its pointer.
    """
    given = {name: text.strip() for name, text in parts.items()}
    values = {name: _part_value(name, text) for name, text in given.items() if text}
    return _validated(FeatureRequest, values)


_JSON_WORDS: dict[str, bool | None] = {"true": True, "false": False, "null": None}


def _part_value(name: str, text: str) -> object:
    if text in _JSON_WORDS:
        return _JSON_WORDS[text]
    if text[0] in '{["':
        return read_json(text, pointer=pointer_to("#", name))
    return text


def _object(document: object, pointer: str) -> dict[str, object]:
    if not isinstance(document, dict):
        raise _malformed(pointer, "the body must be a JSON object")
    return document


Request = TypeVar("Request", bound=BaseModel)


def _validated(kind: type[Request], values: dict[str, object]) -> Request:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise invalid(error, "#", _keys(kind)) from error


def _keys(kind: type[BaseModel]) -> list[str]:
    return [info.alias or name for name, info in kind.model_fields.items()]


# --- images in JSON -----------------------------------------------------------------------------


def decode_base64(text: str, *, pointer: str) -> bytes:
    """The bytes behind standard base64; line breaks and a `data:…;base64,` prefix are allowed.

    Raises:
        MalformedBody: not base64, or a wrong padding.
    """
    if text.startswith("data:"):
        text = _after_data_prefix(text, pointer)
    try:
        return binascii.a2b_base64("".join(text.split()), strict_mode=True)
    except ValueError as error:  # binascii.Error, or a character beyond ASCII
        raise _malformed(pointer, "not valid base64") from error


def _after_data_prefix(text: str, pointer: str) -> str:
    prefix, comma, rest = text.partition(",")
    if not comma or not prefix.endswith(";base64"):
        raise _malformed(pointer, "a data URL must be one of base64")
    return rest
