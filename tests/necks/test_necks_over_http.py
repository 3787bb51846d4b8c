"""Necks with weights as a client sees them: one detector's checkpoint, two networks, levels of the second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import Tensor

from service.backbones.resnet import RESNET
from service.client import BackboneClient
from service.config.spec import WeightsRef
from service.necks.base import LevelFacts, Neck, NeckFamily
from service.necks.catalogue import TYPES, neck_registry
from service.protocol.decode import Features
from tests.conftest import RunningService, Serve, encoded, multipart

BACKBONE = {"type": "ResNet", "depth": 18, "base_channels": 8, "out_indices": [0, 1, 2, 3]}
FPN = {"type": "mmdet.FPN", "in_channels": [8, 16, 32, 64], "out_channels": 12, "num_outs": 5}
WIDTHS = (8, 16, 32, 64)
IMAGES = np.random.default_rng(3).standard_normal((2, 3, 64, 96), np.float32)
DETECTOR = "detector.pth"


def family(config: dict[str, Any]) -> NeckFamily[Any]:
    found: NeckFamily[Any] = neck_registry().resolve(config["type"], pointer="#/neck/type").family
    return found


def facts() -> list[LevelFacts]:
    return [LevelFacts(i, str(i), "NCHW", width, 4 << i) for i, width in enumerate(WIDTHS)]


def made(config: dict[str, Any], seed: int) -> Neck:
    torch.manual_seed(seed)
    chosen = family(config)
    neck: Neck = chosen.build(chosen.config.model_validate(config), facts())
    return neck


def backbone_state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return RESNET.build(RESNET.config.model_validate(BACKBONE)).state_dict()


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


@pytest.fixture(scope="module")
def client(service: RunningService, checkpoint_dir: Path) -> Any:
    """The shared service with files of a detector, of its parts, and of one that is not whole."""
    neck = made(FPN, 1).state_dict()
    detector = {**under("backbone.", backbone_state()), **under("neck.", neck)}
    detector["bbox_head.cls.weight"] = torch.zeros(4, 12)
    torch.save({"meta": {"epoch": 12}, "state_dict": detector}, checkpoint_dir / DETECTOR)
    torch.save(backbone_state(), checkpoint_dir / "backbone-only.pth")
    torch.save(made(FPN, 2).state_dict(), checkpoint_dir / "neck-only.pth")
    gone = "neck.fpn_convs.1.conv.weight"
    rest = {name: tensor for name, tensor in detector.items() if name != gone}
    torch.save({"state_dict": rest}, checkpoint_dir / "not-whole.pth")
    with BackboneClient(service.url, timeout_s=60) as client:
        yield client


def with_weights(config: dict[str, Any], name: str, prefix: str | None = None) -> dict[str, Any]:
    init = {"type": "Pretrained", "checkpoint": name}
    return {**config, "init_cfg": init if prefix is None else {**init, "prefix": prefix}}


def detected(client: BackboneClient, neck: dict[str, Any] = FPN) -> Features:
    backbone = with_weights(BACKBONE, DETECTOR, "backbone.")
    return client.features(backbone=backbone, neck=neck, tensor=IMAGES)


def expected(neck: Neck) -> list[np.ndarray]:
    config = RESNET.config.model_validate(BACKBONE)
    backbone, _ = RESNET.load(config, backbone_state(), WeightsRef("any"))
    nodes = [level.node for level in config.levels(RESNET.describe(config))]
    with torch.inference_mode():
        maps = backbone.eval()(torch.from_numpy(IMAGES), nodes)
        return [level.numpy() for level in neck.eval()([maps[node] for node in nodes])]


def problem(http: httpx.Client, neck: Any, backbone: Any = BACKBONE) -> dict[str, Any]:
    reply = http.post("/features", **multipart(backbone, tensor=IMAGES, neck=neck))
    assert reply.status_code == 422, reply.text
    found: dict[str, Any] = reply.json()
    return found


def test_backbone_and_neck_come_from_one_file(client: BackboneClient) -> None:
    features = detected(client)
    assert list(features.levels) == ["0", "1", "2", "3", "4"]
    assert [level.stride for level in features.levels.values()] == [4, 8, 16, 32, 64]
    for found, array in zip(features.arrays.values(), expected(made(FPN, 1)), strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-6)
    weights = features.model["neck"]["weights"]
    assert (weights["source"], weights["checkpoint"], weights["prefix"]) == ("checkpoint", DETECTOR, "neck.")
    assert (weights["loaded"], weights["missing"]) == (16, [])
    assert "bbox_head.cls.weight" in weights["unexpected"]


def test_a_neck_may_name_a_file_of_its_own(client: BackboneClient) -> None:
    features = detected(client, {**FPN, "checkpoint": "neck-only.pth"})
    for found, array in zip(features.arrays.values(), expected(made(FPN, 2)), strict=True):
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-6)
    assert features.model["neck"]["weights"]["checkpoint"] == "neck-only.pth"
    assert features.model["weights"]["checkpoint"] == DETECTOR


def test_a_backbone_without_weights_may_have_a_neck_with_them(client: BackboneClient) -> None:
    neck = with_weights(FPN, DETECTOR, "neck")
    model = client.features(backbone=BACKBONE, neck=neck, tensor=IMAGES).model
    assert model["weights"]["source"] == "random"
    assert (model["neck"]["weights"]["source"], model["neck"]["weights"]["loaded"]) == ("checkpoint", 16)


def test_a_file_without_a_neck_gives_a_random_one_and_says_so(client: BackboneClient) -> None:
    backbone = with_weights(BACKBONE, "backbone-only.pth")
    features = client.features(backbone=backbone, neck=FPN, tensor=IMAGES)
    assert features.model["weights"]["source"] == "checkpoint"
    weights = features.model["neck"]["weights"]
    assert (weights["source"], weights["checkpoint"], weights["loaded"]) == ("random", None, 0)


def test_a_neck_that_is_not_whole_is_refused_by_what_is_missing(
    client: BackboneClient, http: httpx.Client
) -> None:
    body = problem(http, FPN, with_weights(BACKBONE, "not-whole.pth", "backbone."))
    [fault] = body["errors"]
    assert fault["pointer"] == "#/backbone/init_cfg/checkpoint"
    assert "fpn_convs.1.conv.weight" in fault["detail"]


def test_a_neck_of_another_shape_than_its_file_is_refused(client: BackboneClient, http: httpx.Client) -> None:
    body = problem(http, with_weights({**FPN, "out_channels": 6}, DETECTOR, "neck."))
    assert body["errors"][0]["pointer"] == "#/neck/init_cfg/checkpoint"
    assert "lateral_convs.0.conv.weight" in body["errors"][0]["detail"]


def test_channels_that_the_backbone_does_not_give_are_refused_with_the_right_ones(http: httpx.Client) -> None:
    for neck in (
        {**FPN, "in_channels": [256, 512, 1024, 2048]},
        {**FPN, "in_channels": [8, 16, 32]},
        {
            "type": "mmyolo.YOLOv5PAFPN",
            "in_channels": [8, 16, 32, 64],
            "out_channels": 8,
            "widen_factor": 0.5,
        },
    ):
        [fault] = problem(http, neck)["errors"]
        assert fault["pointer"] == "#/neck/in_channels"
        assert "the backbone gives [8, 16, 32, 64]" in fault["detail"]


def test_random_weights_of_a_neck_are_the_same_on_every_replica(client: BackboneClient, serve: Serve) -> None:
    def asked(of: BackboneClient) -> Features:
        return of.features(backbone=BACKBONE, neck=FPN, tensor=IMAGES)

    first = asked(client)
    with BackboneClient(serve().url, timeout_s=60) as other:
        second = asked(other)
    assert first.model["neck"] == second.model["neck"]
    for name, array in first.arrays.items():
        np.testing.assert_allclose(array, second.arrays[name], rtol=1e-5, atol=1e-7)
        assert np.abs(array).max() > 0


def test_two_necks_share_one_backbone_and_two_backbones_of_equal_levels_one_neck(serve: Serve) -> None:
    with BackboneClient(serve().url, timeout_s=60) as client:
        necks = [FPN, {**FPN, "type": "mmdet.PAFPN"}, None]
        models = [client.features(backbone=BACKBONE, neck=neck, tensor=IMAGES).model for neck in necks]
        assert len({model["id"] for model in models}) == 1
        loaded = client.models()["models"]
        assert sorted(model["type"] for model in loaded) == ["mmdet.FPN", "mmdet.PAFPN", "mmpretrain.ResNet"]
        other = {**BACKBONE, "style": "caffe", "frozen_stages": 1, "depth": 34}
        again = client.features(backbone=other, neck=FPN, tensor=IMAGES).model
        assert again["neck"]["id"] == models[0]["neck"]["id"]
        assert len(client.models()["models"]) == 4


def test_a_neck_takes_levels_from_shallow_to_deep_in_whatever_order_they_are_asked_for(
    client: BackboneClient,
) -> None:
    backbone = with_weights({**BACKBONE, "out_indices": [3, 0, 2, 1]}, DETECTOR, "backbone.")
    mixed = client.features(backbone=backbone, neck=FPN, tensor=IMAGES)
    for name, array in detected(client).arrays.items():
        np.testing.assert_array_equal(mixed.arrays[name], array)


def test_inspect_shows_the_levels_and_the_size_of_a_neck(http: httpx.Client) -> None:
    body = {"backbone": BACKBONE, "neck": FPN, "input_size": [64, 96]}
    shown = http.post("/backbones/inspect", json=body).json()
    held = list(made(FPN, 0).parameters())
    numbers = sum(parameter.numel() for parameter in held)
    assert shown["neck"] == {"type": "mmdet.FPN", "parameters": numbers, "bytes": 4 * numbers}
    assert [level["shape"] for level in shown["levels"]] == [
        [1, 12, 16, 24],
        [1, 12, 8, 12],
        [1, 12, 4, 6],
        [1, 12, 2, 3],
        [1, 12, 1, 2],
    ]
    assert [level["stride"] for level in shown["levels"]] == [4, 8, 16, 32, 64]


def test_a_neck_that_cannot_take_a_size_says_so_whatever_the_preprocessing(http: httpx.Client) -> None:
    backbone = {**BACKBONE, "out_indices": [1, 2, 3]}
    neck = {"type": "mmyolo.YOLOv8PAFPN", "in_channels": [16, 32, 64], "out_channels": [16, 32, 64]}
    photo = encoded(np.zeros((72, 300, 3), np.uint8))
    # As it is, and where the size is only known to be about what it will be.
    big = encoded(np.zeros((240, 300, 3), np.uint8))
    for image in (photo, big):
        given = multipart(backbone, image=image, neck=neck, preprocess={"mode": "native"})
        reply = http.post("/features", **given)
        assert reply.status_code == 422, reply.text
        assert reply.json()["errors"][0]["pointer"] == "#/neck"
    padded = {"mode": "native", "size_divisor": 32}
    reply = http.post("/features", **multipart(backbone, image=big, neck=neck, preprocess=padded))
    assert reply.status_code == 200, reply.text
    assert [level["shape"] for level in reply.json()["levels"]] == [
        [1, 16, 32, 40],
        [1, 32, 16, 20],
        [1, 64, 8, 10],
    ]


def test_the_example_of_every_neck_works_behind_a_resnet50(http: httpx.Client) -> None:
    for type_name, _, _ in TYPES:
        example = family({"type": type_name}).example(type_name)
        widths = example.get("in_channels")
        levels = len(widths) if isinstance(widths, list) else 1
        backbone = {"type": "ResNet", "depth": 50, "out_indices": [0, 1, 2, 3][-levels:]}
        size = [256, 256]
        if type_name == "mmselfsup.ClsBatchNormNeck":  # takes a map beside its class token
            backbone = {"type": "mmcls.VisionTransformer", "arch": "deit-t", "output_cls_token": True}
            size = [224, 224]
        pooled = ["GlobalAveragePooling"] if type_name == "mmpretrain.ClsBatchNormNeck" else []
        body = {"backbone": backbone, "neck": [*pooled, dict(example)], "input_size": size}
        reply = http.post("/backbones/inspect", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["neck"]["type"].endswith(type_name)
