"""Requests: JSON bodies, text parts, and what hostile clients send as either."""

from __future__ import annotations

import base64
import contextlib
import time
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import InvalidConfig, MalformedBody
from service.protocol.request import (
    MAX_DEPTH,
    MAX_LIST_ITEMS,
    decode_base64,
    parse_json_body,
    parse_text_parts,
    read_json,
)

BACKBONE = '{"type":"ResNet","depth":50,"out_indices":[0,1,2,3]}'


def body(**keys: Any) -> bytes:
    return orjson.dumps({"backbone": {"type": "ResNet"}, "images": [{"base64": "AAAA"}], **keys})


def refused(data: bytes) -> list[str]:
    with pytest.raises(InvalidConfig) as caught:
        parse_json_body(data)
    return [fault.pointer for fault in caught.value.faults]


def test_text_parts_are_words_or_json() -> None:
    request = parse_text_parts(
        {
            "backbone": BACKBONE,
            "neck": '"fpn"',
            "preprocess": "crop",
            "precision": "bfloat16",
            "return": "tensors",
            "dtype": ' "float16" ',
            "pool": "gem",
            "normalize": "true",
            "encoding": "base64",
        }
    )
    assert request.backbone == {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3]}
    assert (request.neck, request.preprocess, request.precision) == ("fpn", "crop", "bfloat16")
    assert (request.returns, request.dtype, request.pool) == ("tensors", "float16", "gem")
    assert (request.normalize, request.encoding) == (True, "base64")


def test_what_is_not_given_has_the_contracts_default() -> None:
    request = parse_text_parts({"backbone": "resnet50", "neck": "", "preprocess": "null"})
    assert request.backbone == "resnet50"
    assert (request.neck, request.preprocess, request.returns) == (None, None, None)
    assert (request.precision, request.dtype, request.pool) == ("float32", "float32", "none")
    assert (request.normalize, request.encoding) == (False, "list")


def test_null_in_json_is_not_given() -> None:
    request = parse_json_body(body(neck=None, precision=None, normalize=None))
    assert (request.neck, request.precision, request.normalize) == (None, "float32", False)


def test_bad_json_in_a_part_names_the_part() -> None:
    with pytest.raises(MalformedBody) as caught:
        parse_text_parts({"backbone": '{"type":"ResNet"'})
    [fault] = caught.value.faults
    assert fault.pointer == "#/backbone"
    assert "line 1" in fault.detail
    assert "ResNet" not in caught.value.detail


@pytest.mark.parametrize(
    ("parts", "pointer"),
    [
        ({}, "#/backbone"),
        ({"backbone": ""}, "#/backbone"),
        ({"backbone": "x" * 257}, "#/backbone"),
        ({"backbone": "[1]"}, "#/backbone"),
        ({"backbone": "true"}, "#/backbone"),
        ({"backbone": "a", "precision": "int8"}, "#/precision"),
        ({"backbone": "a", "return": "everything"}, "#/return"),
        ({"backbone": "a", "returns": "tensors"}, "#/returns"),
        ({"backbone": "a", "dtype": "bfloat16"}, "#/dtype"),
        ({"backbone": "a", "pool": '["avg"]'}, "#/pool"),
        ({"backbone": "a", "normalize": "yes"}, "#/normalize"),
        ({"backbone": "a", "images": "[]"}, "#/images"),
        ({"backbone": "a", "a/b~": "1"}, "#/a~1b~0"),
    ],
)
def test_a_part_that_is_not_valid_is_pointed_at(parts: dict[str, str], pointer: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        parse_text_parts(parts)
    assert [fault.pointer for fault in caught.value.faults] == [pointer]


def test_a_misspelt_key_comes_with_the_nearest() -> None:
    with pytest.raises(InvalidConfig, match="nearest: normalize"):
        parse_text_parts({"backbone": "a", "normalise": "true"})


def test_json_bodies_have_images() -> None:
    request = parse_json_body(body(images=[{"base64": "AAAA"}, {"url": "https://example.com/cat.jpg"}]))
    assert [image.url for image in request.images] == [None, "https://example.com/cat.jpg"]


@pytest.mark.parametrize(
    ("images", "pointer"),
    [
        ([], "#/images"),
        ({}, "#/images"),
        ([{}], "#/images/0"),
        ([{"base64": "AA", "url": "https://a"}], "#/images/0"),
        ([{"base64": "AAAA"}, {"base64": ""}], "#/images/1/base64"),
        ([{"url": "x" * 2049}], "#/images/0/url"),
        ([{"path": "/etc/passwd"}], "#/images/0/path"),
        (["AAAA"], "#/images/0"),
    ],
)
def test_an_image_that_is_none_is_pointed_at(images: Any, pointer: str) -> None:
    assert refused(body(images=images)) == [pointer]


@pytest.mark.parametrize("data", [b"", b"[]", b"3", b"null", b'"x"', b"{", b"\xff\xfe", b"{'a': 1}", b"NaN"])
def test_a_body_that_is_no_object_is_malformed(data: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse_json_body(data)


HOSTILE = {
    "20 MB of brackets": b"[" * 20_000_000,
    "deep objects": b'{"a":' * 100_000,
    "deep within the parser's limit": b"[" * 100 + b"]" * 100,
    "10^5 indices": b"[" + b"0," * 99_999 + b"0]",
    "empty objects": b"[" + b"{}," * 5_000_000 + b"{}]",
    "wide and deep": b"[" + b",".join([b"[" * 500 + b"]" * 500] * 100) + b"]",
    "many keys": b"{" + b",".join(b'"%d":1' % key for key in range(100_000)) + b"}",
    "a huge integer": b"1" + b"0" * 400,
    "a number of megabytes": b"1" * 10_000_000,
    "NaN": b"[NaN]",
    "Infinity": b"[-Infinity]",
    "half a surrogate": b'"\\ud800"',
    "not UTF-8": b'"\xff"',
    "a BOM": b"\xef\xbb\xbf{}",
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "nothing but spaces": b" " * 10_000_000,
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_json_is_refused_quickly(data: bytes) -> None:
    started = time.perf_counter()
    with pytest.raises((MalformedBody, InvalidConfig)) as caught:
        read_json(data)
    assert time.perf_counter() - started < 1.0
    assert len(caught.value.detail) < 400


def test_a_list_or_a_depth_over_its_limit_is_pointed_at() -> None:
    long = {"backbone": {"type": "ResNet", "out_indices": [0] * (MAX_LIST_ITEMS + 1)}}
    with pytest.raises(InvalidConfig, match="1025 items; the limit is 1024") as caught:
        read_json(orjson.dumps(long))
    assert caught.value.faults[0].pointer == "#/backbone/out_indices"
    read_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    with pytest.raises(InvalidConfig, match="deeper than 32"):
        read_json(b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1))


def test_the_count_of_images_is_not_this_limit() -> None:
    images = [{"base64": "AAAA"}] * (MAX_LIST_ITEMS + 1)
    assert len(parse_json_body(body(images=images)).images) == MAX_LIST_ITEMS + 1


def test_a_body_of_nothing_but_unknown_keys_is_refused_quickly() -> None:
    started = time.perf_counter()
    assert len(refused(b"{" + b",".join(b'"key%d":1' % key for key in range(9000)) + b"}")) <= 20
    assert time.perf_counter() - started < 1.0


def test_a_large_image_in_json_is_no_trouble() -> None:
    image = bytes(range(256)) * 40_000
    text = base64.b64encode(image).decode()
    request = parse_json_body(body(images=[{"base64": text}]))
    assert decode_base64(request.images[0].base64 or "", pointer="#/images/0/base64") == image


@given(st.binary(max_size=80))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with contextlib.suppress(MalformedBody, InvalidConfig):
        parse_json_body(data)


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=20), max_size=4))
@settings(deadline=None)
def test_any_parts_are_read_or_refused(parts: dict[str, str]) -> None:
    with contextlib.suppress(MalformedBody, InvalidConfig):
        parse_text_parts(parts)


@pytest.mark.parametrize("text", ["AAECAw==", "AAEC\r\nAw==\n", "data:image/png;base64,AAECAw=="])
def test_base64_as_clients_write_it(text: str) -> None:
    assert decode_base64(text, pointer="#") == b"\x00\x01\x02\x03"


@pytest.mark.parametrize(
    "text", ["AAECAw", "AAECAw=", "AA-_", "é", "A", "====", "AA==AA==", "data:image/png,x", "data:"]
)
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(MalformedBody) as caught:
        decode_base64(text, pointer="#/images/0/base64")
    assert caught.value.faults[0].pointer == "#/images/0/base64"
