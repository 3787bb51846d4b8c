"""Rules of OpenMMLab's code that its keys do not tell, each found by running the libraries beside these networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.errors import InvalidConfig
from tests.backbones.test_openmmlab_networks import built, key, outputs, parsed, pointer_of

ONE_STAGE = {"num_blocks": [1], "width_factor": [0.5], "group_layer_map": None, "se_cfg": None}
REPVGG = {
    "type": "mmpretrain.RepVGG",
    "arch": ONE_STAGE,
    "strides": [2],
    "dilations": [1],
    "out_indices": [0],
}
POSITIONS = {
    "type": "mmdet.SwinTransformer",
    "pretrain_img_size": 32,
    "embed_dims": 8,
    "depths": [1],
    "num_heads": [2],
    "window_size": 4,
    "out_indices": [0],
    "use_abs_pos_embed": True,
}
TINY_VIT = {"embed_dims": 8, "num_layers": 1, "num_heads": 2, "feedforward_channels": 16}


def shapes(raw: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    family, config = parsed(raw)
    with torch.device("meta"):
        network = family.build(config)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def test_seresnext_takes_a_ratio_and_keeps_16() -> None:
    given = {"type": "mmpretrain.SEResNeXt", "depth": 50, "se_ratio": 4}
    assert shapes(given)["layer1.0.se_layer.conv1.conv.weight"] == (16, 256, 1, 1)
    assert shapes({**given, "type": "mmpretrain.SEResNet"})["layer1.0.se_layer.conv1.conv.weight"][0] == 64


@pytest.mark.parametrize("scope", ["mmpretrain", "mmdet"])
def test_later_blocks_of_the_first_edge_row_widen_by_4_and_have_no_shortcut(scope: str) -> None:
    raw = {"type": f"{scope}.EfficientNet", "arch": "em", "out_indices": [1]}
    found = shapes(raw)
    assert found["layers.1.0.conv1.conv.weight"][0] == 3 * 32
    assert found["layers.1.1.conv1.conv.weight"][0] == 4 * 24
    network = built(raw)
    block = network.get_submodule("layers.1.1")
    torch.nn.init.zeros_(network.get_parameter("layers.1.1.conv2.bn.weight"))
    torch.nn.init.zeros_(network.get_parameter("layers.1.1.conv2.bn.bias"))
    with torch.inference_mode():
        assert not block(torch.ones(1, 24, 8, 8)).any()


def test_a_deep_stem_of_cspresnet_has_no_max_pool() -> None:
    raw = {"type": "mmpretrain.CSPResNet", "depth": 50, "deep_stem": True, "out_indices": [0]}
    family, config = parsed(raw)
    assert family.describe(config).features[0].stride == 2
    assert outputs(built(raw), (32, 32), ["0"])["0"].shape == (1, 128, 16, 16)


def test_the_stem_of_efficientnetv2_pads_only_if_its_convolution_does() -> None:
    raw = {"type": "mmpretrain.EfficientNetV2", "arch": "b0", "out_indices": [0]}
    assert outputs(built(raw), (64, 64), ["0"])["0"].shape[2:] == (32, 32)
    assert outputs(built({**raw, "conv_cfg": None}), (64, 64), ["0"])["0"].shape[2:] == (31, 31)


def test_cspbep_ignores_use_cspsppf() -> None:
    raw = {"type": "mmyolo.YOLOv6CSPBep"}
    assert key({**raw, "use_cspsppf": True}) == key(raw)
    other = {"type": "mmyolo.YOLOv6EfficientRep"}
    assert key({**other, "use_cspsppf": True}) != key(other)


def test_van_has_the_names_of_mmcls_0_x() -> None:
    named = {"type": "mmpretrain.VAN", "arch": "b2"}
    assert key(named) == key({**named, "arch": "base"})


def test_the_stem_of_repvgg_is_no_wider_than_its_first_stage() -> None:
    raw = {"type": "mmpretrain.RepVGG", "arch": "B0", "base_channels": 32}
    assert shapes(raw)["stem.branch_3x3.conv.weight"][0] == 32
    assert shapes({**raw, "base_channels": 128})["stem.branch_3x3.conv.weight"][0] == 64


@pytest.mark.parametrize(
    ("change", "pointer"),
    [
        ({"dilations": [1, 1]}, "#/backbone/dilations"),
        ({"strides": [2, 2]}, "#/backbone/strides"),
        ({"frozen_stages": 2}, "#/backbone/frozen_stages"),
        ({"arch": {**ONE_STAGE, "width_factor": [0.5, 1]}}, "#/backbone/arch/width_factor"),
        ({"arch": {**ONE_STAGE, "group_layer_map": {"1": 3}}}, "#/backbone/arch"),
        ({"base_channels": 3}, "#/backbone/base_channels"),
    ],
)
def test_a_repvgg_of_its_own_stages_must_fit_together(change: dict[str, Any], pointer: str) -> None:
    assert pointer_of({**REPVGG, **change}) == pointer


def test_absolute_positions_of_mmdet_are_for_one_size_of_images() -> None:
    network = built(POSITIONS)
    assert outputs(network, (32, 32), ["0"])["0"].shape == (1, 8, 8, 8)
    with pytest.raises(InvalidConfig, match="32x32 px"):
        outputs(network, (32, 64), ["0"])
    family, config = parsed(POSITIONS)
    assert family.describe(config).input.size == (32, 32)


def test_average_token_belongs_to_the_spelling_of_mmcls() -> None:
    raw = {"type": "mmpretrain.VisionTransformer", "arch": TINY_VIT, "img_size": 32, "avg_token": True}
    assert pointer_of(raw) == "#/backbone/avg_token"
    _, config = parsed({**raw, "type": "mmcls.VisionTransformer"})
    family, _ = parsed(raw | {"output_cls_token": True})
    assert [level.name for level in config.levels(family.describe(config))] == ["0", "0.cls"]


def test_an_initialiser_may_override_a_module_with_its_own_numbers() -> None:
    init = {"type": "Constant", "val": 0, "layer": "Conv2d", "override": {"name": "conv1", "val": 2}}
    raw = {"type": "mmpretrain.ResNet", "depth": 18}
    assert key({**raw, "init_cfg": init}) == key(raw)


@pytest.mark.parametrize("name", ["ELU", "Sigmoid", "HSigmoid", "Tanh"])
def test_activations_of_mmcv_are_known(name: str) -> None:
    raw = {"type": "mmpretrain.CSPResNet", "depth": 50, "act_cfg": {"type": name}}
    assert key(raw) != key({**raw, "act_cfg": {"type": "ReLU"}})
