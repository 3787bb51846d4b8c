"""Whatever is sent, what comes back is a proper reply or a problem document, and never a 500."""

from __future__ import annotations

from typing import Any

import httpx
import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.problems import assert_any_problem
from tests.fuzz.effort import PROFILE, examples
from tests.fuzz.strategies import (
    ENCODED,
    FILES,
    HEADERS,
    PARAMETERS,
    REPLIES,
    THIN,
    WILD,
    configs,
    dumped,
    mutated_files,
)


def assert_proper(reply: httpx.Response) -> None:
    """A reply of the promised kinds."""
    assert reply.status_code in (200, 304, 400, 404, 406, 413, 415, 422, 502, 503), (
        f"{reply.status_code} {reply.text[:500]}"
    )
    assert reply.headers["x-request-id"]
    if reply.status_code == 200:
        assert reply.headers["content-type"] in REPLIES
        assert reply.content
    elif reply.status_code == 304:
        assert reply.headers["etag"]
        assert reply.content == b""
    else:
        assert_any_problem(reply)


# --- what is claimed ----------------------------------------------------------------------------


@settings(PROFILE, max_examples=examples(150))
@given(config=configs(), parameters=PARAMETERS, image=mutated_files(), headers=HEADERS)
def test_any_form_is_answered(
    http: httpx.Client, config: Any, parameters: dict[str, Any], image: bytes, headers: dict[str, str]
) -> None:
    texts = {"backbone": config, **parameters}
    files = [
        (name, (None, value if isinstance(value, str) else dumped(value))) for name, value in texts.items()
    ]
    assert_proper(http.post("/features", headers=headers, files=[*files, ("image", ("a", image))]))


@settings(PROFILE, max_examples=examples(100))
@given(config=configs(), parameters=PARAMETERS, image=ENCODED | WILD, headers=HEADERS)
def test_any_json_is_answered(
    http: httpx.Client, config: Any, parameters: dict[str, Any], image: Any, headers: dict[str, str]
) -> None:
    body = dumped({"backbone": config, "images": [{"base64": image}], **parameters}).encode(
        "utf-8", "replace"
    )
    assert_proper(
        http.post("/features", content=body, headers={**headers, "Content-Type": "application/json"})
    )


@settings(PROFILE, max_examples=examples(200))
@given(
    config=configs(), neck=st.none() | WILD, size=st.none() | WILD | st.sampled_from([[1, 1], 64, [8192, 1]])
)
def test_any_config_is_inspected_or_refused(http: httpx.Client, config: Any, neck: Any, size: Any) -> None:
    body = dumped({"backbone": config, "neck": neck, "input_size": size}).encode("utf-8", "replace")
    reply = http.post("/backbones/inspect", content=body, headers={"Content-Type": "application/json"})
    assert_proper(reply)
    if reply.status_code == 200:
        assert reply.json()["levels"]


@settings(PROFILE, max_examples=examples(150))
@given(image=mutated_files(), mode=st.sampled_from(["crop", "resize", "native"]))
def test_any_mutated_image_is_decoded_or_refused(http: httpx.Client, image: bytes, mode: str) -> None:
    query = {
        "backbone": dumped(THIN),
        "preprocess": mode if mode == "native" else dumped({"mode": mode, "size": 32}),
    }
    reply = http.post("/features", content=image, params=query, headers={"Content-Type": "image/png"})
    assert_proper(reply)
    assert reply.status_code in (200, 400, 413, 415)


@settings(PROFILE, max_examples=examples(150))
@given(
    body=st.binary(max_size=200)
    | st.sampled_from([b"{}", b"[]", b"--x\r\n\r\n--x--", b"\x93NUMPY\x01\x00v\x00{}"]),
    content_type=st.sampled_from(
        [
            "application/json",
            "multipart/form-data; boundary=x",
            "image/png",
            "application/x-npy",
            "application/octet-stream",
        ]
    )
    | st.from_regex(r"[a-z]{1,9}/[!-~]{1,20}", fullmatch=True),
    query=st.dictionaries(
        st.sampled_from(["backbone", "pool", "return", "x"]), st.text(max_size=20), max_size=3
    ),
    headers=HEADERS,
)
def test_any_bytes_are_answered(
    http: httpx.Client, body: bytes, content_type: str, query: dict[str, str], headers: dict[str, str]
) -> None:
    asked = {**headers, "Content-Type": content_type}
    params = {name: value.encode("utf-8", "replace").decode() for name, value in query.items()}
    assert_proper(http.post("/features", content=body, params=params, headers=asked))


@settings(PROFILE, max_examples=examples(150))
@given(
    parts=st.lists(
        st.tuples(
            st.sampled_from([b"image", b"backbone", b"tensor", b"pool", b"", b"\xff", b'a"b']),
            st.sampled_from(
                [b"", b'; filename="a"', b"; filename*=utf-8''%00", b"\r\nContent-Type: x", b"\r\n:"]
            ),
            st.binary(max_size=30) | st.sampled_from([FILES["PNG"], orjson.dumps(THIN), b"resnet"]),
        ),
        max_size=4,
    ),
    end=st.sampled_from([b"--x--\r\n", b"--x--", b"--x", b"", b"--y--\r\n"]),
)
def test_any_parts_are_answered(
    http: httpx.Client, parts: list[tuple[bytes, bytes, bytes]], end: bytes
) -> None:
    lines = [
        b'--x\r\nContent-Disposition: form-data; name="' + name + b'"' + more + b"\r\n\r\n" + data + b"\r\n"
        for name, more, data in parts
    ]
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    assert_proper(http.post("/features", content=b"".join(lines) + end, headers=headers))


@settings(PROFILE, max_examples=examples(100))
@given(
    path=st.lists(
        st.sampled_from(
            ["backbones", "configs", "models", "docs", "..", "%2e%2e", "%00", "", "timm.resnet18", "inspect"]
        )
        | st.from_regex(r"[!-~]{1,10}", fullmatch=True).map(
            lambda text: text.replace("?", "").replace("#", "")
        ),
        max_size=4,
    ),
    query=st.dictionaries(
        st.sampled_from(["scope", "search", "limit", "cursor", "x"]), st.text(max_size=20), max_size=3
    ),
)
def test_any_address_is_answered(http: httpx.Client, path: list[str], query: dict[str, str]) -> None:
    params = {name: value.encode("utf-8", "replace").decode() for name, value in query.items()}
    reply = http.get("/x/../" + "/".join(path), params=params)
    assert reply.status_code in (200, 404, 405, 422), f"{reply.status_code} {reply.text[:500]}"
    if reply.status_code != 200:
        assert_any_problem(reply)
