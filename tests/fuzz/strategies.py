"""What clients send, made up: configs, parameters, images and headers that are right, or nearly, or not at all."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import orjson
from hypothesis import strategies as st

from tests.conftest import encoded

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
