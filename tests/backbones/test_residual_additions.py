"""What mmdet puts into residual networks: deformable convolutions, modules inside blocks, standardised weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from service.backbones.block_plugins import GeneralizedAttention, NonLocal2d
from service.backbones.deformable import DeformConv2d
from service.backbones.standardised import WeightStandardisedConv2d
from tests.backbones.residual import assert_maps_are_as_described, built, maps, pointer_of, small

DCN = {"type": "DCN", "deform_groups": 1, "fallback_on_stride": False}
FALLS_BACK = {**DCN, "fallback_on_stride": True}
LATER = [False, True, True, True]
CONTEXT: dict[str, Any] = {"cfg": {"type": "ContextBlock", "ratio": 0.25}, "position": "after_conv3"}
ATTENTION: dict[str, Any] = {
    "cfg": {"type": "GeneralizedAttention", "num_heads": 2},
    "position": "after_conv2",
}
NON_LOCAL: dict[str, Any] = {
    "cfg": {"type": "NonLocal2d", "mode": "concatenation"},
    "position": "after_conv1",
}


def attention(**options: Any) -> dict[str, Any]:
    """ATTENTION with these options."""
    return {**ATTENTION, "cfg": {**ATTENTION["cfg"], **options}}


def names_of(network: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, kind)]


# --- deformable convolutions ----------------------------------------------------------------------


def test_offsets_of_zero_are_the_plain_convolution() -> None:
    plain, deformable = small("mmdet.ResNet"), small("mmdet.ResNet", dcn=DCN, stage_with_dcn=LATER)
    ours, theirs = built(plain), built(deformable)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    for node, expected in maps(plain, ours).items():
        torch.testing.assert_close(maps(deformable, theirs)[node], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("mmdet.ResNet", ["layer2.0.conv2"]), ("mmdet.ResNetV1d", ["layer2.0.conv2"]), ("mmdet.ResNeXt", [])],
)
def test_falling_back_is_forgotten_after_the_first_block(name: str, plain: list[str]) -> None:
    always = names_of(built(small(name, dcn=DCN, stage_with_dcn=LATER)), DeformConv2d)
    falling = names_of(built(small(name, dcn=FALLS_BACK, stage_with_dcn=LATER)), DeformConv2d)
    assert always[0] == "layer2.0.conv2"
    assert [name for name in always if name not in falling] == plain


def test_deform_groups_have_a_former_name() -> None:
    former = {"type": "DCNv2", "deformable_groups": 2}
    now = {"type": "DCNv2", "deform_groups": 2}
    keys = [small("mmdet.ResNet", dcn=dcn, stage_with_dcn=LATER).key() for dcn in (former, now)]
    assert keys[0] == keys[1]
    assert small("mmdet.ResNet", dcn={"type": "DCNv2"}, stage_with_dcn=LATER).key() != keys[0]


@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"dcn": DCN, "stage_with_dcn": [True]}, "stage_with_dcn"),
        ({"dcn": DCN, "stage_with_dcn": LATER, "conv_cfg": {"type": "ConvWS"}}, "conv_cfg"),
        ({"dcn": DCN, "stage_with_dcn": LATER, "depth": 18}, "dcn"),
        ({"dcn": {"type": "DCN", "deform_groups": 3}, "stage_with_dcn": LATER}, "dcn/deform_groups"),
        ({"dcn": {"type": "DCN", "deform_groups": 10**6}}, "dcn/deform_groups"),
        ({"dcn": {"type": "DCNv3"}}, "dcn/type"),
        ({"dcn": {"type": "DCN", "kernel_size": 99}}, "dcn/kernel_size"),
    ],
)
def test_deformable_convolutions_that_cannot_be_built_are_refused(keys: dict[str, Any], key: str) -> None:
    assert pointer_of("mmdet.ResNet", **{"depth": 50, **keys}) == f"#/backbone/{key}"


# --- modules inside blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("plugin", [CONTEXT, ATTENTION, NON_LOCAL])
def test_a_module_inside_blocks_is_initialised_and_changes_their_maps(plugin: dict[str, Any]) -> None:
    chosen = small("mmdet.ResNet", plugins=[plugin])
    assert_maps_are_as_described(chosen)
    network = built(chosen)
    before = maps(chosen, network)["0"].clone()
    with torch.no_grad():
        for block in network.modules():
            if isinstance(block, (GeneralizedAttention, NonLocal2d)) or hasattr(block, "channel_add_conv"):
                for parameter in block.parameters():
                    parameter.add_(0.1)
    assert not torch.allclose(maps(chosen, network)["0"], before)


def test_two_of_a_kind_are_told_apart_by_a_postfix() -> None:
    second = {**CONTEXT, "cfg": {**CONTEXT["cfg"], "postfix": 2}}
    network = built(small("mmdet.ResNet", plugins=[CONTEXT, second]))
    first_block = network.get_submodule("layer1.0")
    assert {"context_block", "context_block2"} <= dict(first_block.named_children()).keys()
    elsewhere = {**CONTEXT, "stages": [True, False, False, False]}
    assert small("mmdet.ResNet", plugins=[elsewhere, {**CONTEXT, "stages": LATER}])


@pytest.mark.parametrize(
    ("plugins", "key"),
    [
        ([CONTEXT, CONTEXT], "plugins/1/cfg/postfix"),
        ([{**CONTEXT, "stages": [True]}], "plugins/0/stages"),
        ([{**CONTEXT, "position": "after_conv4"}], "plugins/0/position"),
        ([{**CONTEXT, "cfg": {"type": "ContextBlock", "ratio": 1e-9}}], "plugins/0/cfg/ratio"),
        ([{**CONTEXT, "cfg": {"type": "subprocess.Popen"}}], "plugins/0/cfg"),
        ([attention(spatial_range=5)], "plugins/0/cfg/spatial_range"),
        ([attention(attention_type="0110")], "plugins/0/cfg/attention_type"),
        ([attention(position_embedding_dim=6)], "plugins/0/cfg/position_embedding_dim"),
        ([attention(num_heads=64)], "plugins/0/cfg/num_heads"),
        ([CONTEXT] * 9, "plugins"),
    ],
)
def test_modules_that_cannot_be_built_are_refused(plugins: list[Any], key: str) -> None:
    assert pointer_of("mmdet.ResNet", depth=50, base_channels=8, plugins=plugins) == f"#/backbone/{key}"
    assert pointer_of("mmdet.ResNet", depth=18, plugins=[CONTEXT]) == "#/backbone/plugins"


# --- standardised weights -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("mmpretrain.ResNet", 0),
        ("mmdet.ResNeXt", 0),
        ("mmpretrain.SEResNet", 32),  # two in each of 16 blocks
        ("mmdet.ResNeSt", 32),
    ],
)
def test_every_convolution_but_those_of_attention_standardises(name: str, plain: int) -> None:
    network = built(small(name, conv_cfg={"type": "ConvWS"}))
    standardised = names_of(network, WeightStandardisedConv2d)
    assert len(names_of(network, nn.Conv2d)) - len(standardised) == plain
    assert "layer1.0.conv1" in standardised


def test_scale_and_offset_of_standardised_weights_do_not_matter() -> None:
    layer = WeightStandardisedConv2d(3, 4, 3, bias=False)
    images = torch.randn(1, 3, 8, 8)
    with torch.inference_mode():
        expected = layer(images)
        layer.weight.copy_(3 * layer.weight + 1)
        torch.testing.assert_close(layer(images), expected, rtol=1e-3, atol=1e-3)
