"""`multipart/form-data` as clients and the hostile write it, and parameters that are sent again and again."""

from __future__ import annotations

import io
import json
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.api.forms import FormLimits, FormPart, parse_form
from service.errors import MalformedBody, TooLarge
from tests.api.problems import assert_problem
from tests.conftest import encoded, multipart

LIMITS = FormLimits(max_files=3, max_texts=2, max_text_bytes=2048)
HEAD = b'Content-Disposition: form-data; name="image"; filename="a"\r\n\r\n'


def parse(body: bytes, boundary: bytes = b"x") -> list[FormPart]:
    return parse_form(body, boundary, LIMITS)


def form(*parts: bytes, end: bytes = b"--x--\r\n") -> bytes:
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end


@given(texts=st.lists(st.text(max_size=50), max_size=2), files=st.lists(st.binary(max_size=300), max_size=3))
@settings(max_examples=60, deadline=None)
def test_what_httpx_writes_is_read_back(texts: list[str], files: list[bytes]) -> None:
    fields = [("image", ("a.jpg", io.BytesIO(data), "image/jpeg")) for data in files]
    fields += [("backbone", (None, text.encode())) for text in texts]  # type: ignore[misc]  # a text part
    request = httpx.Request("POST", "http://x", files=fields or {"image": ("a", b"")})
    boundary = request.headers["content-type"].partition("boundary=")[2].encode()
    expected = [FormPart("image", data, is_file=True) for data in files]
    expected += [FormPart("backbone", text.encode(), is_file=False) for text in texts]
    assert parse(request.read(), boundary) == (expected or [FormPart("image", b"", is_file=True)])


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n--",
        b"\r\n--y",
        b"\r\n-",
        b"--x",
        b"\r",
        b"\n--x",
        b"\r\n--X--",
        b"\r\n" * 10_000,
        bytes(3_000_000),
    ],
    ids=lambda data: repr(data[:10]),
)
def test_a_file_may_hold_what_looks_like_a_boundary(data: bytes) -> None:
    assert parse(form(HEAD + data)) == [FormPart("image", data, is_file=True)]


def test_names_may_be_quoted_unquoted_and_in_utf_8_or_latin_1() -> None:
    parts = [b"content-disposition:form-data;name=%s\r\n\r\n1" % name for name in (b"a", b'"\xc3\xa4"')]
    assert [part.name for part in parse(form(*parts))] == ["a", "ä"]
    assert parse(form(b'Content-Disposition: form-data; name="\xe4"\r\n\r\n1'))[0].name == "ä"


def test_a_boundary_between_parts_may_have_blanks_behind_it() -> None:
    body = b"--x\r\n" + HEAD + b"1\r\n--x \t \r\n" + HEAD + b"2\r\n--x--\r\n"
    assert [part.data for part in parse(body)] == [b"1", b"2"]


def test_a_part_that_does_not_end_is_none() -> None:
    assert parse(form(HEAD + b"1", end=b"--x\r\n" + HEAD + b"2"))[1:] == []


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"no form", "Invalid multipart data"),
        (form(b"no header"), "Invalid multipart data"),
        (form(b"Content-Disposition: form-data\r\n\r\n1"), '"name" must be provided'),
        (form(b"X: y\r\n\r\n1"), '"name" must be provided'),
        (form(b"\r\n1"), '"name" must be provided'),
        (form(HEAD + b"1", end=b"--x" + b" " * 10_000_000), "256 blanks"),
        (b"--x" + b"\t" * 256, "256 blanks"),
        (form(b"X: y\r\n" * 20 + HEAD), "Invalid multipart data"),
        (form(b"X: " + b"y" * 10_000 + b"\r\n" + HEAD), "Invalid multipart data"),
    ],
    ids=range(9),
)
def test_what_is_no_form_is_refused(body: bytes, reason: str) -> None:
    with pytest.raises(MalformedBody, match=reason):
        parse(body)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (form(*[HEAD + b"1"] * 4), "more than 3 files"),
        (form(*[b'Content-Disposition: form-data; name="a"\r\n\r\n1'] * 3), "more than 2 texts"),
        (form(b'Content-Disposition: form-data; name="a"\r\n\r\n' + bytes(2049)), "2,048 bytes"),
        (form(HEAD + b"\r\n--xy" * 3_000_000), "more than 5 parts"),
    ],
    ids=range(4),
)
def test_a_form_beyond_a_limit_is_too_large(body: bytes, reason: str) -> None:
    with pytest.raises(TooLarge, match=reason):
        parse(body)


@pytest.mark.parametrize("boundary", [b"", b"y" * 300])
def test_a_boundary_that_cannot_be_is_refused(boundary: bytes) -> None:
    with pytest.raises(MalformedBody):
        parse(form(HEAD + b"1"), boundary)


@pytest.mark.parametrize("parameter", ["boundary", "boundary=", 'boundary=""', "boundary*=utf-8''x"])
def test_a_form_without_a_boundary_is_refused(http: httpx.Client, parameter: str) -> None:
    body = form(b'Content-Disposition: form-data; name="pool"\r\n\r\navg').replace(b"--x", b"--")
    reply = http.post(
        "/features", content=body, headers={"Content-Type": f"multipart/form-data; {parameter}"}
    )
    assert "Missing boundary" in assert_problem(reply, 400, "malformed-body")["detail"]


@given(body=st.binary(max_size=300))
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_or_no_parts(body: bytes) -> None:
    try:
        assert parse(b"--x\r\n" + body) == [] or b"--x" in body
    except (MalformedBody, TooLarge):
        assert body


# --- parameters that are kept -------------------------------------------------------------------

NORM = {"type": "BN", "requires_grad": True}
REPEATED: list[dict[str, Any]] = [
    {"backbone": {"type": "ResNet", "depth": 18, "base_channels": 8, "norm_cfg": NORM, "init_cfg": None}},
    {
        "backbone": {
            "type": "mmdet.ResNet",
            "depth": 18,
            "base_channels": 8,
            "norm_cfg": NORM,
            "strides": [8, 16],
        },
        "neck": [{"type": "FPN", "in_channels": [16, 32], "out_channels": 8, "num_outs": 2}],
        "preprocess": {"mode": "resize", "size": [64, 64], "mean": [1.0, 2.0, 3.0], "std": [4.0, 5.0, 6.0]},
    },
    {
        "backbone": {"type": "TIMMBackbone", "model_name": "resnet10t", "features_only": True},
        "preprocess": {"mean": [123.0, 116.0, 103.0], "std": [58.0, 57.0, 57.0], "bgr_to_rgb": True},
    },
    {"backbone": {"type": "torchvision.resnet18", "return_nodes": {"layer1": "c2"}}, "pool": "gem"},
]
IMAGE = encoded(np.full((64, 64, 3), 77, np.uint8))


@pytest.mark.parametrize("given", REPEATED, ids=range(len(REPEATED)))
def test_what_is_asked_again_is_answered_the_same(http: httpx.Client, given: dict[str, Any]) -> None:
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in given.items()}
    anew = {**texts, "backbone": texts["backbone"] + " "}  # the same, but not seen before

    def raw(query: dict[str, str]) -> httpx.Response:
        return http.post("/features", params=query, content=IMAGE, headers={"Content-Type": "image/png"})

    def form(parts: dict[str, str]) -> httpx.Response:
        return http.post(
            "/features",
            **multipart(parts["backbone"], IMAGE, **{k: v for k, v in parts.items() if k != "backbone"}),
        )

    replies = [ask(texts if again else anew) for ask in (raw, form) for again in (True, True, False)]
    assert [reply.status_code for reply in replies] == [200] * 6, replies[0].text
    assert len({reply.headers["etag"] for reply in replies}) == 1
    described = [{**reply.json(), "timings_ms": None} for reply in replies]
    assert all(one == described[0] for one in described)


def test_a_refusal_is_not_kept_for_another(http: httpx.Client) -> None:
    for _ in range(2):
        wrong = http.post(
            "/features?backbone=resnet50&pool=all", content=IMAGE, headers={"Content-Type": "image/png"}
        )
        assert wrong.status_code == 422
        assert wrong.json()["errors"][0]["pointer"] == "#/pool"
