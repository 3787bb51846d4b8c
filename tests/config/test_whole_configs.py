"""Whole configs of detectors and classifiers: which backbone, neck, weights and preprocessing are served of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from service.config.files import ConfigCatalogue, NamedConfig
from service.config.pipelines import read_pipeline
from service.config.preprocess import IMAGENET, PreprocessSpec, parse_preprocess, resolve_preprocess
from service.errors import InvalidConfig
from tests.processes import ROOT

RESNET = {"type": "ResNet", "depth": 50}
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def load(folder: Path, **values: Any) -> NamedConfig:
    (folder / "own.json").write_bytes(orjson.dumps(values))
    return ConfigCatalogue(folder).load("own")


def spec(config: NamedConfig) -> PreprocessSpec:
    return resolve_preprocess(parse_preprocess(config.preprocess), [])


# --- the parts --------------------------------------------------------------------------------------


def test_the_default_scope_is_that_of_types_without_one(tmp_path: Path) -> None:
    model = {"type": "X", "backbone": RESNET, "neck": {"type": "FPN"}}
    config = load(tmp_path, default_scope="mmdet", model=model)
    assert (config.backbone["type"], config.neck["type"]) == ("mmdet.ResNet", "mmdet.FPN")
    own = {"backbone": {**RESNET, "type": "mmcls.ResNet"}, "neck": {"type": "FPN", "_scope_": "mmyolo"}}
    config = load(tmp_path, default_scope="mmdet", model=own)
    assert (config.backbone["type"], config.neck) == ("mmcls.ResNet", {"type": "mmyolo.FPN"})
    config = load(tmp_path, model=model)
    assert (config.backbone["type"], config.neck["type"]) == ("ResNet", "FPN")


def test_what_a_training_run_needs_beside_the_model_is_no_part(tmp_path: Path) -> None:
    model = {"backbone": RESNET, "bbox_head": {"type": "Y"}}
    config = load(tmp_path, model=model, optim_wrapper={"optimizer": {"type": "SGD"}})
    assert config.resolved() == {"backbone": RESNET, "preprocess": {"mode": "native"}}


def test_a_chain_of_one_neck_stays_a_chain_and_its_parts_have_no_weights_beside_the_whole_models(
    tmp_path: Path,
) -> None:
    neck = {"type": "GlobalAveragePooling"}
    assert load(tmp_path, model={"backbone": RESNET, "neck": [neck]}).neck == [neck]
    filled = [neck, {**neck, "init_cfg": {"type": "Pretrained", "checkpoint": "a.pth"}}]
    model = {"backbone": RESNET, "neck": filled}
    assert load(tmp_path, model=model, load_from="whole.pth").neck == [neck, neck]
    scoped = load(tmp_path, model=model, default_scope="mmdet").neck
    assert [part["type"] for part in scoped] == ["mmdet.GlobalAveragePooling"] * 2


@pytest.mark.parametrize(
    ("values", "pointer", "said"),
    [
        ({"model": {"type": "X"}}, "#/model/backbone", "has no model.backbone"),
        ({"model": {"detector": {"backbone": RESNET}}}, "#/model/backbone", "there is one in model.detector"),
        ({"model": [RESNET]}, "#/model", "must be an object"),
        ({"model": {"backbone": "resnet50"}}, "#/model/backbone", "must be an object"),
        ({"model": {"backbone": RESNET}, "default_scope": 3}, "#/backbone", "scope"),
        ({"model": {"backbone": RESNET}, "default_scope": "a b"}, "#/backbone", "scope"),
        (
            {"model": {"backbone": {**RESNET, "init_cfg": {"type": "Kaiming"}}, "pretrained": "a.pth"}},
            "#/model/pretrained",
            "init_cfg",
        ),
        ({"model": {"backbone": RESNET, "data_preprocessor": 3}}, "#/model/data_preprocessor", "object"),
        ({"model": {"backbone": {**RESNET, "a": "{{ $HOME:x }}"}}}, "#/model/backbone/a", "environment"),
    ],
)
def test_a_whole_config_that_cannot_be_served_says_what_was_looked_for(
    tmp_path: Path, values: dict[str, Any], pointer: str, said: str
) -> None:
    with pytest.raises(InvalidConfig, match=said) as refused:
        load(tmp_path, **values)
    assert refused.value.faults[0].pointer == pointer


# --- weights ----------------------------------------------------------------------------------------

OWN = {"type": "Pretrained", "checkpoint": "torchvision://resnet50"}
NECK = {"type": "FPN", "init_cfg": {"type": "Pretrained", "checkpoint": "neck.pth"}}


def init(checkpoint: str, **more: str) -> dict[str, str]:
    return {"type": "Pretrained", "checkpoint": checkpoint, **more}


@pytest.mark.parametrize(
    ("values", "model", "backbone", "neck"),
    [
        ({}, {"backbone": {**RESNET, "init_cfg": OWN}, "neck": NECK}, OWN, NECK["init_cfg"]),
        ({}, {"backbone": RESNET, "pretrained": "torchvision://resnet50"}, OWN, None),
        ({}, {"backbone": RESNET, "pretrained": None}, None, None),
        (
            {},
            {"type": "ImageClassifier", "backbone": RESNET, "pretrained": "whole.pth"},
            init("whole.pth", prefix="backbone."),
            None,
        ),
        (
            {},
            {
                "backbone": {**RESNET, "init_cfg": OWN},
                "neck": NECK,
                "init_cfg": init("a.pth", prefix="student"),
            },
            init("a.pth", prefix="student.backbone."),
            None,
        ),
        (
            {"load_from": "b.pth"},
            {"backbone": {**RESNET, "init_cfg": OWN}, "neck": NECK, "init_cfg": init("a.pth")},
            init("b.pth", prefix="backbone."),
            None,
        ),
        (
            {"load_from": "b.pth"},
            {"backbone": {**RESNET, "pretrained": True}, "pretrained": "a.pth"},
            init("b.pth", prefix="backbone."),
            None,
        ),
        ({"load_from": None}, {"backbone": RESNET, "init_cfg": [{"type": "Kaiming"}]}, None, None),
    ],
)
def test_the_weights_that_mmengine_loads_last_are_served(
    tmp_path: Path, values: dict[str, Any], model: dict[str, Any], backbone: Any, neck: Any
) -> None:
    config = load(tmp_path, model=model, **values)
    assert config.backbone.get("init_cfg") == backbone
    assert "pretrained" not in config.backbone
    assert (config.neck or {}).get("init_cfg") == neck


# --- images -----------------------------------------------------------------------------------------


def test_the_models_preprocessor_goes_before_the_top_levels(tmp_path: Path) -> None:
    inner = {"type": "mmdet.DetDataPreprocessor", "mean": MEAN, "std": STD, "pad_size_divisor": 32}
    config = load(
        tmp_path,
        model={"backbone": RESNET, "data_preprocessor": inner},
        data_preprocessor={"mean": [0, 0, 0], "std": [1, 1, 1]},
    )
    found = spec(config)
    assert (found.mode, found.channel_order, found.size_divisor) == ("native", "bgr", 32)
    assert found.mean == pytest.approx([value / 255 for value in MEAN])


def test_a_classifiers_resize_and_crop_are_done(tmp_path: Path) -> None:
    pipeline = [
        {"type": "LoadImageFromFile"},
        {
            "type": "ResizeEdge",
            "scale": 248,
            "edge": "short",
            "backend": "pillow",
            "interpolation": "bicubic",
        },
        {"type": "CenterCrop", "crop_size": 224},
        {"type": "PackInputs"},
    ]
    config = load(
        tmp_path,
        model={"type": "ImageClassifier", "backbone": RESNET},
        data_preprocessor={"num_classes": 1000, "mean": MEAN, "std": STD, "to_rgb": True},
        test_dataloader={"dataset": {"pipeline": pipeline}},
        test_pipeline=[{"type": "Resize", "scale": 32}],
    )
    found = spec(config)
    assert (found.mode, found.size, found.interpolation) == ("crop", (224, 224), "bicubic")
    assert int(224 / found.crop_pct) == 248
    assert (found.mean, found.channel_order) == (pytest.approx(IMAGENET.mean, abs=1e-4), "rgb")
    assert config.notes == ()


def test_the_older_libraries_normalise_in_the_pipeline(tmp_path: Path) -> None:
    steps = [
        {"type": "Resize", "keep_ratio": True},
        {"type": "Normalize", "mean": [103.53, 116.28, 123.675], "std": [1.0, 1.0, 1.0], "to_rgb": False},
        {"type": "Pad", "size_divisor": 32},
    ]
    flip = {"type": "MultiScaleFlipAug", "img_scale": [1333, 800], "flip": False, "transforms": steps}
    config = load(tmp_path, model={"backbone": RESNET}, data={"test": {"pipeline": [flip]}})
    found = spec(config)
    assert (found.mode, found.size_divisor, found.channel_order) == ("native", 32, "bgr")
    assert found.std == pytest.approx([1 / 255] * 3)
    assert len(config.notes) == 1
    assert "1333" in config.notes[0]
    older = load(tmp_path, model={"backbone": RESNET}, img_norm_cfg={"mean": MEAN, "std": STD})
    assert spec(older).channel_order == "rgb"


def test_a_config_that_says_nothing_of_images_says_so(tmp_path: Path) -> None:
    config = load(tmp_path, model={"type": "ImageClassifier", "backbone": RESNET})
    assert config.preprocess is None
    assert config.notes == ("there is no data_preprocessor: images are normalised as by default",)


@pytest.mark.parametrize(
    ("steps", "placing"),
    [
        ([("Resize", {"scale": 384})], {"mode": "resize", "size": [384, 384], "interpolation": "bilinear"}),
        (
            [("Resize", {"scale": [128, 256]})],
            {"mode": "resize", "size": [256, 128], "interpolation": "bilinear"},
        ),
        (
            [("Resize", {"size": [256, 128]})],
            {"mode": "resize", "size": [256, 128], "interpolation": "bilinear"},
        ),
        ([("Resize", {"scale": 4, "interpolation": "area"})], {"mode": "resize", "size": [4, 4]}),
        (
            [("Resize", {"size": [256, -1]}), ("CenterCrop", {"crop_size": 224})],
            {"mode": "crop", "size": [224, 224], "crop_pct": 0.875, "interpolation": "bilinear"},
        ),
        (
            [("EfficientNetCenterCrop", {"crop_size": 224})],
            {"mode": "crop", "size": [224, 224], "crop_pct": 0.875, "interpolation": "bicubic"},
        ),
        (
            [("CenterCrop", {"crop_size": 224, "efficientnet_style": True})],
            {"mode": "crop", "size": [224, 224], "crop_pct": 0.875, "interpolation": "bilinear"},
        ),
        ([("mmdet.Resize", {"scale": [1333, 800], "keep_ratio": True})], {}),
        ([("ResizeEdge", {"scale": 256})], {}),
        ([("ResizeEdge", {"scale": 256, "edge": "long"}), ("CenterCrop", {"crop_size": 224})], {}),
        ([("ResizeEdge", {"scale": 224}), ("CenterCrop", {"crop_size": 256})], {}),
        ([("ResizeEdge", {"scale": "256"}), ("CenterCrop", {"crop_size": [1, 2, 3]})], {}),
        ([("CenterCrop", {"crop_size": 224})], {}),
        ([("LetterResize", {"scale": [640, 640]})], {}),
    ],
)
def test_what_preprocess_cannot_say_is_noted(
    steps: list[tuple[str, dict[str, Any]]], placing: dict[str, Any]
) -> None:
    facts = read_pipeline([{"type": kind, "backend": "pillow", **keys} for kind, keys in steps])
    assert facts.placing == placing
    assert bool(facts.notes) == (not placing)


def test_what_a_letterbox_pads_is_padded_to_what_the_network_takes() -> None:
    named = ConfigCatalogue(ROOT / "model_configs").load("mmyolo/yolov5_s_640")
    assert named.preprocess["data_preprocessor"]["pad_size_divisor"] == 32
    assert parse_preprocess(named.preprocess).size_divisor == 32
    assert any("LetterResize" in note for note in named.notes)


def test_a_short_edge_survives_as_a_fraction() -> None:
    for edge in range(224, 1024):
        steps = [{"type": "ResizeEdge", "scale": edge}, {"type": "CenterCrop", "crop_size": 224}]
        assert int(224 / read_pipeline(steps).placing["crop_pct"]) == edge


@pytest.mark.parametrize("pipeline", [None, 3, "x", [3, None, {"type": 3}], [{"type": "MultiScaleFlipAug"}]])
def test_a_pipeline_that_is_none_says_nothing(pipeline: object) -> None:
    assert read_pipeline(pipeline).placing == {}


def test_every_shipped_config_is_readable() -> None:
    catalogue = ConfigCatalogue(ROOT / "model_configs")
    names = catalogue.names()
    assert {"mmdet/faster-rcnn_r50_fpn", "mmpretrain/swin-tiny_in1k", "mmyolo/yolov5_s_640"} <= set(names)
    assert not any(name.startswith("_") for name in names)
    for name in names:
        parse_preprocess(catalogue.load(name).preprocess)
