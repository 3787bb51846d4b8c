"""`preprocess` in every spelling becomes one spec, and nothing hostile gets through."""

from __future__ import annotations

import pytest

from service.config.preprocess import (
    PreprocessRequest,
    parse_preprocess,
    resolve_preprocess,
)
from service.config.spec import PreprocessDefaults
from service.errors import InvalidConfig

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MMDET = {
    "type": "mmdet.DetDataPreprocessor",
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "bgr_to_rgb": True,
    "pad_mask": True,
    "pad_size_divisor": 32,
}
MMPRETRAIN = {
    "num_classes": 1000,
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "to_rgb": True,
}


def close(numbers):
    return pytest.approx(numbers, rel=1e-6)


@pytest.mark.parametrize("raw", [None, {}, {"mode": None, "size": None}])
def test_silence_means_imagenets_own(raw):
    spec = resolve_preprocess(parse_preprocess(raw), [])
    assert (spec.mode, spec.size, spec.crop_pct, spec.interpolation) == (
        "crop",
        (224, 224),
        0.875,
        "bilinear",
    )
    assert (spec.mean, spec.std, spec.channel_order, spec.size_divisor) == (
        IMAGENET_MEAN,
        IMAGENET_STD,
        "rgb",
        1,
    )


def test_the_first_default_that_says_it_wins_and_the_request_wins_over_all():
    checkpoint = PreprocessDefaults(size=(256, 192), mean=(0.5, 0.4, 0.3))
    architecture = PreprocessDefaults(
        size=(320, 320), crop_pct=0.95, interpolation="bicubic", std=(0.1, 0.2, 0.3)
    )
    spec = resolve_preprocess(parse_preprocess({"crop_pct": 1}), [checkpoint, architecture])
    assert (spec.size, spec.crop_pct, spec.interpolation) == ((256, 192), 1.0, "bicubic")
    assert (spec.mean, spec.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))


def test_defaults_are_turned_round_for_bgr():
    spec = resolve_preprocess(
        parse_preprocess({"channel_order": "bgr"}), [PreprocessDefaults(mean=(0.1, 0.2, 0.3))]
    )
    assert spec.mean == (0.3, 0.2, 0.1)
    assert spec.std == IMAGENET_STD[::-1]


def test_defaults_of_other_than_three_channels_are_passed_over():
    assert resolve_preprocess(parse_preprocess(None), [PreprocessDefaults(mean=(0.5,))]).mean == IMAGENET_MEAN


def test_a_bare_word_is_the_mode():
    assert parse_preprocess("native") == PreprocessRequest(mode="native")


@pytest.mark.parametrize(("size", "expected"), [(256, (256, 256)), ([320, 640], (320, 640)), (1, (1, 1))])
def test_size_is_a_number_or_height_and_width(size, expected):
    assert parse_preprocess({"size": size}).size == expected


@pytest.mark.parametrize(
    ("raw", "mean", "std"),
    [
        ({"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}, IMAGENET_MEAN, IMAGENET_STD),
        ({"mean": [123.675, 116.28, 103.53], "std": [58.395, 57.12, 57.375]}, IMAGENET_MEAN, IMAGENET_STD),
        ({"mean": [0, 0, 0], "std": [255, 255, 255]}, (0, 0, 0), (1, 1, 1)),
        ({"mean": [0, 0, 0], "std": [1, 1, 1]}, (0, 0, 0), (1, 1, 1)),
        ({"mean": [-1, -1, -1], "std": [1, 1, 1]}, (-1, -1, -1), (1, 1, 1)),
        (
            {"mean": [103.53, 116.28, 123.675], "std": [1, 1, 1]},
            (0.406, 0.456, 0.485),
            (1 / 255, 1 / 255, 1 / 255),
        ),
        ({"std": [58.395, 57.12, 57.375]}, IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_numbers_above_one_are_in_units_of_255(raw, mean, std):
    spec = resolve_preprocess(parse_preprocess(raw), [])
    assert spec.mean == close(mean)
    assert spec.std == close(std)


@pytest.mark.parametrize(
    "raw",
    [{"mean": [0.485, 0.456, 0.406], "std": [58, 57, 57]}, {"mean": [123, 116, 103], "std": [0.2, 0.2, 0.2]}],
)
def test_mean_and_std_in_different_units_are_refused(raw):
    with pytest.raises(InvalidConfig, match="different units"):
        parse_preprocess(raw)


@pytest.mark.parametrize("nested", [False, True])
def test_mmdets_preprocessor_keeps_sizes_and_pads(nested):
    spec = resolve_preprocess(parse_preprocess({"data_preprocessor": MMDET} if nested else MMDET), [])
    assert (spec.mode, spec.size, spec.size_divisor, spec.channel_order) == ("native", None, 32, "rgb")
    assert spec.mean == close(IMAGENET_MEAN)
    assert spec.std == close(IMAGENET_STD)


def test_mmpretrains_preprocessor_leaves_the_size_to_the_defaults():
    spec = resolve_preprocess(parse_preprocess(MMPRETRAIN), [PreprocessDefaults(size=(384, 384))])
    assert (spec.mode, spec.size, spec.channel_order) == ("crop", (384, 384), "rgb")
    assert spec.mean == close(IMAGENET_MEAN)


def test_jpegs_are_decoded_whole_unless_every_spelling_says_otherwise():
    assert not resolve_preprocess(parse_preprocess(None), []).fast_decode
    for raw in ({"fast_decode": True}, {**MMPRETRAIN, "fast_decode": True}):
        assert resolve_preprocess(parse_preprocess(raw), []).fast_decode
    beside = {"data_preprocessor": MMDET, "mode": "resize", "size": 64, "fast_decode": True}
    assert resolve_preprocess(parse_preprocess(beside), []).fast_decode


@pytest.mark.parametrize("mode", ["crop", "resize", "native"])
def test_a_spec_says_whether_it_decodes_fast_where_that_has_an_effect(mode):
    said = resolve_preprocess(parse_preprocess({"mode": mode}), []).as_json()
    assert ("fast_decode" in said) == (mode != "native")


def test_geometry_may_stand_beside_a_data_preprocessor():
    request = parse_preprocess({"data_preprocessor": MMDET, "mode": "resize", "size": [320, 640]})
    assert (request.mode, request.size, request.size_divisor) == ("resize", (320, 640), 32)


def test_openmmlab_without_swap_sees_bgr():
    raw = {
        "type": "ImgDataPreprocessor",
        "mean": [103.53, 116.28, 123.675],
        "std": [1, 1, 1],
        "bgr_to_rgb": False,
    }
    request = parse_preprocess(raw)
    assert request.channel_order == "bgr"
    assert request.mean == close((0.406, 0.456, 0.485))


def test_openmmlab_without_mean_does_not_normalise():
    request = parse_preprocess({"type": "DetDataPreprocessor", "pad_size_divisor": 32})
    assert request.mean == (0, 0, 0)
    assert request.std == close((1 / 255, 1 / 255, 1 / 255))


def test_detectron2s_numbers_are_bgr_and_255_unless_it_says_rgb():
    request = parse_preprocess({"pixel_mean": [103.53, 116.28, 123.675], "pixel_std": [1.0, 1.0, 1.0]})
    assert (request.mode, request.channel_order) == ("native", "bgr")
    assert request.mean == close((0.406, 0.456, 0.485))
    rgb = {
        "pixel_mean": [123.675, 116.28, 103.53],
        "pixel_std": [58.395, 57.12, 57.375],
        "input_format": "RGB",
    }
    assert parse_preprocess(rgb).channel_order == "rgb"
    assert parse_preprocess(rgb | {"mode": "crop", "size": 224}).mode == "crop"


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ([], "#/preprocess"),
        (7, "#/preprocess"),
        ("", "#/preprocess"),
        ("squash", "#/preprocess"),
        ({"mode": "squash"}, "#/preprocess/mode"),
        ({"mod": "crop"}, "#/preprocess/mod"),
        ({"size": 0}, "#/preprocess/size"),
        ({"size": 4097}, "#/preprocess/size"),
        ({"size": True}, "#/preprocess/size"),
        ({"size": 224.5}, "#/preprocess/size"),
        ({"size": "224"}, "#/preprocess/size"),
        ({"size": [224]}, "#/preprocess/size/1"),
        ({"size": [224, -1]}, "#/preprocess/size/1"),
        ({"size": [224, 224, 3]}, "#/preprocess/size"),
        ({"crop_pct": 0.01}, "#/preprocess/crop_pct"),
        ({"crop_pct": 1.5}, "#/preprocess/crop_pct"),
        ({"crop_pct": float("nan")}, "#/preprocess/crop_pct"),
        ({"interpolation": "random"}, "#/preprocess/interpolation"),
        ({"mean": 0.5}, "#/preprocess/mean"),
        ({"mean": [0.5]}, "#/preprocess/mean"),
        ({"mean": [0.5, "0.5", 0.5]}, "#/preprocess/mean/1"),
        ({"mean": [0.5, float("nan"), 0.5]}, "#/preprocess/mean/1"),
        ({"mean": [float("inf"), 0, 0]}, "#/preprocess/mean/0"),
        ({"mean": [1e300, 0, 0]}, "#/preprocess/mean/0"),
        ({"std": [0.2, 0.0, 0.2]}, "#/preprocess/std/1"),
        ({"std": [0.2, 1e-300, 0.2]}, "#/preprocess/std/1"),
        ({"std": [0.2, -1, 0.2]}, "#/preprocess/std/1"),
        ({"channel_order": "grb"}, "#/preprocess/channel_order"),
        ({"size_divisor": 0}, "#/preprocess/size_divisor"),
        ({"size_divisor": 10**9}, "#/preprocess/size_divisor"),
        ({"size_divisor": True}, "#/preprocess/size_divisor"),
        ({"mode": "native", "size": 224}, "#/preprocess/size"),
        ({"mode": "native", "crop_pct": 0.9}, "#/preprocess/crop_pct"),
        ({"mode": "resize", "crop_pct": 0.9}, "#/preprocess/crop_pct"),
        ({"mode": "native", "fast_decode": True}, "#/preprocess/fast_decode"),
        ({"type": "DetDataPreprocessor", "fast_decode": True}, "#/preprocess/fast_decode"),
        (
            {"data_preprocessor": {"to_rgb": True, "fast_decode": True}},
            "#/preprocess/data_preprocessor/fast_decode",
        ),
        ({"fast_decode": 1}, "#/preprocess/fast_decode"),
        ({"fast_decode": "true"}, "#/preprocess/fast_decode"),
        ({"type": "subprocess.Popen"}, "#/preprocess/type"),
        ({"type": "DetDataPreprocessor", "size": 640}, "#/preprocess/size"),
        ({"type": "DetDataPreprocessor", "mean": [1.0, 2.0, 3.0]}, "#/preprocess/std"),
        ({"to_rgb": "yes"}, "#/preprocess/to_rgb"),
        ({"to_rgb": True, "rgb_to_bgr": True}, "#/preprocess/rgb_to_bgr"),
        ({"to_rgb": True, "pad_value": 114}, "#/preprocess/pad_value"),
        ({"data_preprocessor": 3}, "#/preprocess/data_preprocessor"),
        ({"data_preprocessor": {"type": "x"}}, "#/preprocess/data_preprocessor/type"),
        ({"data_preprocessor": {"mode": "crop"}}, "#/preprocess/data_preprocessor/mode"),
        ({"data_preprocessor": MMDET, "mean": [0, 0, 0]}, "#/preprocess/mean"),
        ({"pixel_mean": [1, 2]}, "#/preprocess/pixel_mean"),
        ({"pixel_mean": [1, 2, 3], "input_format": "YUV"}, "#/preprocess/input_format"),
        ({"pixel_mean": [1, 2, 3], "mean": [1, 2, 3]}, "#/preprocess/mean"),
        ({1: 2}, "#/preprocess/1"),
    ],
)
def test_what_is_wrong_is_named_by_its_pointer(raw, pointer):
    with pytest.raises(InvalidConfig) as caught:
        parse_preprocess(raw)
    assert pointer in [fault.pointer for fault in caught.value.faults]


def test_messages_do_not_carry_the_payload_back():
    with pytest.raises(InvalidConfig) as caught:
        parse_preprocess({"interpolation": "hunter2", "mode": "hunter2", "mean": ["hunter2"] * 3})
    assert "hunter2" not in caught.value.detail
    with pytest.raises(InvalidConfig) as caught:
        parse_preprocess("hunter2")
    assert "hunter2" not in caught.value.detail


@pytest.mark.parametrize(
    "raw",
    [
        None,
        "resize",
        MMDET,
        {"mode": "native", "size_divisor": 32, "channel_order": "bgr"},
        {"size": [320, 640], "crop_pct": 1.0, "interpolation": "lanczos"},
        {"fast_decode": True},
        {"mode": "native", "fast_decode": False},
        {"pixel_mean": [103.53, 116.28, 123.675], "mode": "crop"},
    ],
)
def test_a_spec_sent_back_as_json_asks_for_itself(raw):
    spec = resolve_preprocess(parse_preprocess(raw), [])
    again = resolve_preprocess(parse_preprocess(spec.as_json()), [])
    assert again == spec
    assert hash(again) == hash(spec)
