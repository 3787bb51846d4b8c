"""detrex's wrappers of timm and torchvision: names of levels, what is frozen, which checkpoints fit."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch

from service.backbones.detrex_timm import DETREX_TIMM, DetrexTimmConfig
from service.backbones.detrex_torchvision import TORCHVISION_BACKBONE, TORCHVISION_RESNET
from service.backbones.torchvision import TORCHVISION
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig

REF = WeightsRef("any")


def timm_config(**keys: Any) -> DetrexTimmConfig:
    given = {"type": "detrex.TimmBackbone", "model_name": "test_resnet", **keys}
    return DetrexTimmConfig.model_validate(given)


def resnet_config(**keys: Any) -> Any:
    given = {"type": "detrex.TorchvisionResNet", "name": "resnet18", "train_backbone": True, **keys}
    return TORCHVISION_RESNET.config.model_validate(given)


# --- TimmBackbone ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indices", "names"),
    [([3, 1], ["p3", "p1"]), ([-1, 2], ["p-1", "p2"]), ([0], ["p0"]), (2, ["p3", "p4"])],
)
def test_a_level_is_named_by_its_index_as_written_and_is_that_feature(indices: Any, names: list[str]) -> None:
    config = timm_config(out_indices=indices)
    network, description = DETREX_TIMM.build(config).eval(), DETREX_TIMM.describe(config)
    levels = config.levels(description)
    assert [level.name for level in levels] == names
    with torch.inference_mode():
        found = network(torch.zeros(1, 3, 64, 64), [level.node for level in levels])
    channels = {feature.node: feature.channels for feature in description.features}
    for level in levels:
        assert found[level.node].shape[1] == channels[level.node]
        assert found[level.node].shape[2] == 64 // 2 ** (level.index + 1)


def test_only_the_features_asked_for_are_built() -> None:
    shallow, deep = (DETREX_TIMM.describe(timm_config(out_indices=[index])) for index in (1, 4))
    assert 0 < shallow.parameters < deep.parameters
    by_stride = timm_config(strides=[32, 8])
    levels = by_stride.levels(DETREX_TIMM.describe(by_stride))
    assert [level.name for level in levels] == ["p4", "p2"]


@pytest.mark.parametrize("norm", ["FrozenBatchNorm2d", "FrozenBN", "detectron2.layers.FrozenBatchNorm2d"])
def test_frozen_norms_are_constants_and_no_parameters(norm: str) -> None:
    frozen, plain = (timm_config(norm_layer=name) for name in (norm, None))
    network = DETREX_TIMM.build(frozen)
    report, trained = network.frozen(frozen.freeze()), DETREX_TIMM.build(plain).frozen(plain.freeze())
    assert (report.parameters, trained.norms) == ((), ())
    assert report.of == trained.of - 2 * len(report.norms)
    assert all(name.startswith("timm_model.") for name in report.norms)


@pytest.mark.parametrize(
    ("pointer", "keys"),
    [
        ("#/backbone/out_indices/1", {"out_indices": [0, 5]}),
        ("#/backbone/out_indices", {"out_indices": [1, 1]}),
        ("#/backbone/out_indices", {"out_indices": [4, -1]}),
        ("#/backbone/out_indices", {"out_indices": 9}),
        ("#/backbone/strides/0", {"strides": [64]}),
    ],
)
def test_a_feature_that_is_not_there_is_refused_at_its_place(pointer: str, keys: dict[str, Any]) -> None:
    config = timm_config(**keys)
    with pytest.raises(InvalidConfig) as refused:
        config.levels(DETREX_TIMM.describe(config))
    assert refused.value.faults[0].pointer == pointer


# --- TorchvisionBackbone --------------------------------------------------------------------------


def test_torchvisions_model_is_shared_and_called_as_detrex_calls_its_levels() -> None:
    config = TORCHVISION_BACKBONE.config.model_validate(
        {"type": "detrex.TorchvisionBackbone", "model_name": "resnet18"}
    )
    own = TORCHVISION.config.model_validate({"type": "torchvision.resnet18"})
    assert config.key() == own.key()
    levels = config.levels(TORCHVISION_BACKBONE.describe(config))
    assert [(level.name, level.node) for level in levels] == [
        ("res2", "layer1"), ("res3", "layer2"), ("res4", "layer3"), ("res5", "layer4"),
    ]  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_a_file_that_has_every_weight_twice_fits(prefix: str) -> None:
    config = TORCHVISION_BACKBONE.config.model_validate(
        {
            "type": "detrex.TorchvisionBackbone",
            "model_name": "squeezenet1_1",
            "return_nodes": {"features": "f"},
        }
    )
    state = TORCHVISION_BACKBONE.build(config).net.state_dict()
    twice = {f"{prefix}{copy}.{n}": t for copy in ("model", "feature_extractor") for n, t in state.items()}
    _, keys = TORCHVISION_BACKBONE.load(config, twice, REF)
    assert (keys.loaded, keys.missing, keys.unexpected) == (len(twice), (), ())


# --- TorchvisionResNet ----------------------------------------------------------------------------


def test_layers_behind_the_deepest_asked_for_are_not_there() -> None:
    config = resnet_config(return_layers={"layer3": "c4", "layer1": "c2"})
    network = TORCHVISION_RESNET.build(config)
    assert not any(name.startswith("body.layer4") for name in network.state_dict())
    levels = config.levels(TORCHVISION_RESNET.describe(config))
    assert [(level.name, level.node) for level in levels] == [("c4", "layer3"), ("c2", "layer1")]
    with pytest.raises(CheckpointMismatch) as refused:
        TORCHVISION_RESNET.load(resnet_config(), network.state_dict(), REF)
    assert {name.split(".")[1] for name in refused.value.missing} == {"layer4"}


@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "wide_resnet50_2"])
def test_channels_and_strides_are_those_of_the_maps(name: str) -> None:
    config = resnet_config(name=name, strides=[2, 4, 8, 16, 32])
    description = TORCHVISION_RESNET.describe(config)
    with torch.device("meta"), torch.inference_mode():
        nodes = [feature.node for feature in description.features]
        found = TORCHVISION_RESNET.build(config).eval()(torch.empty(1, 3, 64, 64), nodes)
    for feature in description.features:
        assert found[feature.node].shape[1:] == (feature.channels, 64 // feature.stride, 64 // feature.stride)


@pytest.mark.parametrize(
    ("key", "keys"),
    [
        ("name", {"name": "vgg16"}),
        ("train_backbone", {"train_backbone": None}),
        ("dilation", {"dilation": True}),
        ("return_layers", {"return_layers": {"layer4": "a", "layer3": "a"}}),
        ("return_layers", {"return_layers": {}}),
    ],
)
def test_what_torchvision_cannot_build_is_refused_at_its_key(
    key: str, keys: dict[str, Any], http: httpx.Client
) -> None:
    backbone = {"type": "detrex.TorchvisionResNet", "name": "resnet18", "train_backbone": True, **keys}
    reply = http.post("/backbones/inspect", json={"backbone": backbone})
    assert reply.status_code == 422
    assert reply.json()["errors"][0]["pointer"] == f"#/backbone/{key}"
