"""Whatever is sent, what comes back is a proper reply or a problem document, and never a 500."""

from __future__ import annotations

import base64
import os
from typing import Any

import httpx
import numpy as np
import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.problems import assert_any_problem
from tests.conftest import encoded

settings.register_profile(
    "service",
    deadline=None,
    derandomize="CI" in os.environ,
    database=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
    ],
)
PROFILE = settings.get_profile("service")
PICTURE = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
FILES = {form: encoded(PICTURE, form) for form in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")}
THIN = {"type": "ResNet", "depth": 18, "stem_channels": 8, "base_channels": 8}
REPLIES = {
    "application/json",
    "application/x-npz",
    "application/x-npy",
    "application/vnd.safetensors",
    "application/vnd.apache.arrow.stream",
}

# --- what is generated --------------------------------------------------------------------------

WILD = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**63),
        st.integers(-2, 5),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=12),
        st.sampled_from(["", "0", "layer1", "../x", "os.system", "Pretrained", "a" * 300, "\0", "1e999"]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
KEYS = [
    "type",
    "depth",
    "arch",
    "in_channels",
    "base_channels",
    "num_stages",
    "strides",
    "dilations",
    "out_indices",
    "style",
    "frozen_stages",
    "norm_eval",
    "norm_cfg",
    "conv_cfg",
    "init_cfg",
    "checkpoint",
    "pretrained",
    "features_only",
    "img_size",
    "patch_size",
    "output_stride",
    "return_nodes",
    "weights",
    "norm_layer",
    "model_name",
    "out_type",
    "with_cls_token",
    "drop_rate",
    "act_layer",
    "freeze_to_index",
    "avg_down",
    "deep_stem",
    "interpolate_mode",
    "final_norm",
    "qkv_bias",
    "layer_cfgs",
    "patch_cfg",
    "output_cls_token",
    "layer_scale_init_value",
    "pre_norm",
    "progress",
    "num_classes",
]
BASES: tuple[dict[str, Any], ...] = (
    THIN,
    {"type": "timm.test_resnet"},
    {"type": "TIMMBackbone", "model_name": "test_vit"},
    {"type": "timm.test_convnext"},
    {"type": "torchvision.squeezenet1_1"},
    {"type": "mmpretrain.VisionTransformer", "arch": "deit-tiny"},
    {},
)


@st.composite
def configs(draw: st.DrawFn) -> Any:
    """A config that works, with some of its keys given wild values; now and then no config at all."""
    base = dict(draw(st.sampled_from(BASES)))
    base.update(draw(st.dictionaries(st.sampled_from(KEYS), WILD, max_size=3)))
    return draw(st.sampled_from([base, base, base, base, draw(WILD)]))


PREPROCESS = st.dictionaries(
    st.sampled_from(
        (
            "mode",
            "size",
            "crop_pct",
            "interpolation",
            "mean",
            "std",
            "channel_order",
            "size_divisor",
            "fast_decode",
            "type",
            "to_rgb",
        )
    ),
    WILD
    | st.sampled_from(
        ["native", "resize", "crop", 32, 64, [32, 48], "bicubic", "bgr", [0.5] * 3, [127.5] * 3]
    ),
    max_size=3,
)
PARTS: dict[str, st.SearchStrategy[Any]] = {
    "neck": WILD | st.just({"type": "GlobalAveragePooling"}),
    "preprocess": PREPROCESS | WILD | st.just("native"),
    "precision": st.sampled_from(["float32", "bfloat16", "float16", "int8", ""]) | WILD,
    "return": st.sampled_from(["shapes", "tensors", "x"]) | WILD,
    "dtype": st.sampled_from(["float32", "float16", "x"]) | WILD,
    "pool": st.sampled_from(["none", "avg", "max", "gem", "cls", "x"]) | WILD,
    "normalize": st.booleans() | WILD,
    "encoding": st.sampled_from(["list", "base64", "x"]) | WILD,
}
PARAMETERS = st.fixed_dictionaries({}, optional=PARTS)


@st.composite
def mutated_files(draw: st.DrawFn) -> bytes:
    """An image file with some bytes changed, cut, doubled or put in."""
    data = bytearray(draw(st.sampled_from(sorted(FILES.values()))))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(data) - 1)) if data else 0
        match draw(st.integers(0, 3)):
            case 0:
                data[place : place + 1] = draw(st.binary(min_size=1, max_size=4))
            case 1:
                del data[place:]
            case 2:
                data[place:place] = data[: draw(st.integers(0, 64))]
            case _:
                del data[place : place + draw(st.integers(1, 64))]
    return bytes(data)


ENCODED = st.sampled_from([base64.b64encode(data).decode() for data in FILES.values()])
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Accept": st.sampled_from(
            [*sorted(REPLIES), "*/*", "application/*;q=0.1", "text/html", ";;,", "a/b;q=x"]
        ),
        "If-None-Match": st.sampled_from(["*", '"x"', "W/", ","]),
        "X-Request-ID": st.from_regex(r"[!-~]{1,40}", fullmatch=True),
        "Content-Encoding": st.sampled_from(["identity", "gzip", "x"]),
    },
)


def dumped(value: Any) -> str:
    """JSON as a client would write it; integers beyond 64 bits as numbers too."""
    return orjson.dumps(value, default=str).decode() if not _has_large(value) else repr(value)


def _has_large(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_large(item) for item in value.values())
    if isinstance(value, list):
        return any(_has_large(item) for item in value)
    return isinstance(value, int) and not -(2**63) <= value < 2**64


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


@settings(PROFILE, max_examples=150)
@given(config=configs(), parameters=PARAMETERS, image=mutated_files(), headers=HEADERS)
def test_any_form_is_answered(
    http: httpx.Client, config: Any, parameters: dict[str, Any], image: bytes, headers: dict[str, str]
) -> None:
    texts = {"backbone": config, **parameters}
    files = [
        (name, (None, value if isinstance(value, str) else dumped(value))) for name, value in texts.items()
    ]
    assert_proper(http.post("/features", headers=headers, files=[*files, ("image", ("a", image))]))


@settings(PROFILE, max_examples=100)
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


@settings(PROFILE, max_examples=200)
@given(
    config=configs(), neck=st.none() | WILD, size=st.none() | WILD | st.sampled_from([[1, 1], 64, [8192, 1]])
)
def test_any_config_is_inspected_or_refused(http: httpx.Client, config: Any, neck: Any, size: Any) -> None:
    body = dumped({"backbone": config, "neck": neck, "input_size": size}).encode("utf-8", "replace")
    reply = http.post("/backbones/inspect", content=body, headers={"Content-Type": "application/json"})
    assert_proper(reply)
    if reply.status_code == 200:
        assert reply.json()["levels"]


@settings(PROFILE, max_examples=150)
@given(image=mutated_files(), mode=st.sampled_from(["crop", "resize", "native"]))
def test_any_mutated_image_is_decoded_or_refused(http: httpx.Client, image: bytes, mode: str) -> None:
    query = {
        "backbone": dumped(THIN),
        "preprocess": mode if mode == "native" else dumped({"mode": mode, "size": 32}),
    }
    reply = http.post("/features", content=image, params=query, headers={"Content-Type": "image/png"})
    assert_proper(reply)
    assert reply.status_code in (200, 400, 413, 415)


@settings(PROFILE, max_examples=150)
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


@settings(PROFILE, max_examples=150)
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


@settings(PROFILE, max_examples=100)
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
