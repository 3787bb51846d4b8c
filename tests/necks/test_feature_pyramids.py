"""FPN and the necks like it, where the packs of the real libraries do not go: odd keys, odd sizes, shared necks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.config.spec import Layout, WeightsRef
from service.errors import InvalidConfig
from service.necks.base import LevelFacts, Neck, NeckConfig, NeckFamily
from service.necks.catalogue import neck_registry

WIDTHS = (8, 16, 32)
FPN = {"type": "mmdet.FPN", "in_channels": [8, 16, 32], "out_channels": 4, "num_outs": 3}


def family(type_name: str) -> NeckFamily[Any]:
    found: NeckFamily[Any] = neck_registry().resolve(type_name, pointer="#/neck/type").family
    return found


def facts(widths: tuple[int, ...] = WIDTHS, layout: Layout = "NCHW") -> list[LevelFacts]:
    return [LevelFacts(i + 1, str(i + 1), layout, width, 8 << i) for i, width in enumerate(widths)]


def config(raw: dict[str, Any], **changed: Any) -> NeckConfig:
    found: NeckConfig = family(raw["type"]).config.model_validate({**raw, **changed})
    return found


def built(raw: dict[str, Any], **changed: Any) -> Neck:
    torch.manual_seed(0)
    neck: Neck = family(raw["type"]).build(config(raw, **changed), facts())
    return neck.eval()


def maps(height: int = 16, width: int = 24) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(1, c, height >> i, width >> i) for i, c in enumerate(WIDTHS)]


@torch.inference_mode()
def run(neck: Neck, features: list[Tensor] | None = None) -> list[Tensor]:
    return neck(maps() if features is None else features)


def refused(raw: dict[str, Any], levels: list[LevelFacts] | None = None, **changed: Any) -> tuple[str, str]:
    with pytest.raises(InvalidConfig) as error:
        family(raw["type"]).describe(config(raw, **changed), facts() if levels is None else levels)
    fault = error.value.faults[0]
    return fault.pointer, fault.detail


# --- FPN ------------------------------------------------------------------------------------------


def test_extra_levels_on_output_continue_from_the_last_level() -> None:
    neck = built(FPN, num_outs=5, add_extra_convs="on_output", relu_before_extra_convs=True)
    found = run(neck)
    convs = list(neck.get_submodule("fpn_convs").children())
    with torch.inference_mode():
        fourth = convs[3](found[2])  # no ReLU before the first
        fifth = convs[4](F.relu(fourth))
    assert torch.equal(found[3], fourth)
    assert torch.equal(found[4], fifth)


def test_true_means_on_input() -> None:
    written = [
        config(FPN, num_outs=4, add_extra_convs=value).key() for value in (True, "on_input", "on_lateral")
    ]
    assert written[0] == written[1] != written[2]


def test_what_changes_no_number_makes_no_second_neck() -> None:
    plain = config(FPN).key()
    for changed in (
        {"add_extra_convs": True},  # there are no extra levels
        {"relu_before_extra_convs": True},
        {"end_level": 2},
        {"conv_cfg": {"type": "Conv2d"}},
        {"no_norm_on_lateral": True},
        {"init_cfg": {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}},
        {"checkpoint": "any.pth"},
    ):
        assert config(FPN, **changed).key() == plain, changed
    assert config(FPN, act_cfg={"type": "ReLU"}).key() != plain


def test_levels_are_counted_from_the_first_one_used() -> None:
    neck = built(FPN, start_level=1, num_outs=2)
    assert list(neck.state_dict())[::2] == [
        "lateral_convs.0.conv.weight",
        "lateral_convs.1.conv.weight",
        "fpn_convs.0.conv.weight",
        "fpn_convs.1.conv.weight",
    ]
    described = family("mmdet.FPN").describe(config(FPN, start_level=1, num_outs=2), facts())
    assert [(level.name, level.stride) for level in described.levels] == [("0", 16), ("1", 32)]
    whole, below = maps(), maps()
    below[0] = below[0] + 1
    assert all(torch.equal(a, b) for a, b in zip(run(neck, whole), run(neck, below), strict=True))


def test_a_last_level_that_is_not_used_changes_nothing() -> None:
    neck = built(FPN, end_level=1, num_outs=2)
    above = maps()
    above[2] = above[2] + 1
    assert all(torch.equal(a, b) for a, b in zip(run(neck), run(neck, above), strict=True))


def test_laterals_may_go_without_the_norm() -> None:
    names = set(built(FPN, norm_cfg={"type": "BN"}, no_norm_on_lateral=True).state_dict())
    assert "fpn_convs.0.bn.running_mean" in names
    assert {"lateral_convs.0.conv.bias"} == {name for name in names if name.startswith("lateral_convs.0")} - {
        "lateral_convs.0.conv.weight"
    }


@pytest.mark.parametrize("type_name", ["mmdet.FPN", "mmdet.PAFPN"])
def test_odd_sizes_fit_together(type_name: str) -> None:
    features = [torch.randn(1, 8, 25, 19), torch.randn(1, 16, 13, 10), torch.randn(1, 32, 7, 5)]
    found = run(built({**FPN, "type": type_name}, num_outs=4), features)
    assert [tuple(level.shape[2:]) for level in found] == [(25, 19), (13, 10), (7, 5), (4, 3)]


@pytest.mark.parametrize(
    ("changed", "pointer", "detail"),
    [
        ({"num_outs": 2}, "num_outs", "2 is less than the 3 levels used"),
        ({"end_level": 3}, "end_level", "3 is not a level of 0 to 2"),
        ({"start_level": 3}, "start_level", "3 leaves none of the levels up to 2"),
        ({"end_level": 1, "num_outs": 3}, "num_outs", "3 is not the 2 levels up to end_level"),
        (
            {"norm_cfg": {"type": "GN", "num_groups": 3}},
            "norm_cfg/num_groups",
            "3 groups do not divide 4 channels",
        ),
        ({"upsample_cfg": {"align_corners": True}}, "upsample_cfg/align_corners", "is not for nearest"),
        (
            {"in_channels": [8, 16, 64]},
            "in_channels",
            "the backbone gives [8, 16, 32], the neck takes [8, 16, 64]",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: dict[str, Any], pointer: str, detail: str) -> None:
    assert refused(FPN, **changed) == (f"#/neck/{pointer}", detail)


def test_tokens_are_refused() -> None:
    pointer, detail = refused(FPN, facts(layout="NLC"))
    assert (pointer, detail) == ("#/neck", "mmdet.FPN takes maps; level 1 is tokens (NLC)")


# --- mmdet's other necks --------------------------------------------------------------------------


def test_a_mapper_may_have_a_bias_beside_its_norm() -> None:
    mapper = {"type": "mmdet.ChannelMapper", "in_channels": [8, 16, 32], "out_channels": 4}
    normed = {**mapper, "norm_cfg": {"type": "GN", "num_groups": 2}}
    assert "convs.0.conv.bias" not in built(normed).state_dict()
    assert "convs.0.conv.bias" in built(normed, bias=True).state_dict()
    assert "convs.0.gn.weight" in built(normed).state_dict()
    assert config(mapper, num_outs=2).key() == config(mapper).key()


def test_the_pyramid_of_hrnet_may_pool_by_the_maximum_and_stride() -> None:
    pyramid = {"type": "mmdet.HRFPN", "in_channels": [8, 16, 32], "out_channels": 4, "num_outs": 3}
    mean, largest = run(built(pyramid)), run(built(pyramid, pooling_type="MAX"))
    assert torch.equal(mean[0], largest[0])
    assert not torch.allclose(mean[1], largest[1])
    strided = family("mmdet.HRFPN").describe(config(pyramid, stride=2), facts())
    assert [level.stride for level in strided.levels] == [16, 32, 64]
    assert config(pyramid, norm_cfg={"type": "BN"}, with_cp=True).key() == config(pyramid).key()


def test_yolov3_takes_levels_shallow_first_and_gives_them_deep_first() -> None:
    yolo = {
        "type": "mmdet.YOLOV3Neck",
        "num_scales": 3,
        "in_channels": [32, 16, 8],
        "out_channels": [6, 4, 2],
    }
    described = family("mmdet.YOLOV3Neck").describe(config(yolo), facts())
    assert [(level.channels, level.stride) for level in described.levels] == [(6, 32), (4, 16), (2, 8)]
    assert refused(yolo, num_scales=2) == ("#/neck/in_channels", "has 3 entries for 2 scales")
    assert refused(yolo, in_channels=[8, 16, 32])[0] == "#/neck/in_channels"


# --- YOLO -----------------------------------------------------------------------------------------

YOLOX = {"type": "mmyolo.YOLOXPAFPN", "in_channels": [8, 16, 32], "out_channels": 12, "num_csp_blocks": 1}
MMDET_NAMES = (
    ("reduce_layers.0.", "reduce_layers.2."),
    ("reduce_layers.1.", "top_down_layers.0.1."),
    ("top_down_blocks.0.", "top_down_layers.0.0."),
    ("top_down_blocks.1.", "top_down_layers.1."),
    ("downsamples.", "downsample_layers."),
    ("bottom_up_blocks.", "bottom_up_layers."),
    ("out_convs.", "out_layers."),
)


@pytest.mark.parametrize("name", ["YOLOXPAFPN", "CSPNeXtPAFPN"])
def test_mmdets_and_mmyolos_necks_are_the_same_by_other_names(name: str) -> None:
    common = {**YOLOX, "norm_cfg": {"type": "BN"}}
    theirs = built({**common, "type": f"mmyolo.{name}"})
    state = theirs.state_dict()
    ours = {}
    for key in built({**common, "type": f"mmdet.{name}"}).state_dict():
        old, new = next(pair for pair in MMDET_NAMES if key.startswith(pair[0]))
        ours[key] = state[new + key.removeprefix(old)]
    chosen = family(f"mmdet.{name}")
    mmdet, keys = chosen.load(config({**common, "type": f"mmdet.{name}"}), facts(), ours, WeightsRef("any"))
    assert keys.loaded == len(state) == len(ours)
    for a, b in zip(run(theirs), run(mmdet.eval()), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_widths_are_of_before_widen_factor_and_the_refusal_says_so() -> None:
    pointer, detail = refused({**YOLOX, "in_channels": [8, 16, 64]}, widen_factor=0.5)
    assert pointer == "#/neck/in_channels"
    assert detail == "the backbone gives [8, 16, 32], the neck takes [8, 16, 64], widened to [4, 8, 32]"
    described = family("mmyolo.YOLOXPAFPN").describe(
        config(YOLOX, in_channels=[16, 32, 64], widen_factor=0.5), facts()
    )
    assert [level.channels for level in described.levels] == [6, 6, 6]


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        (
            {"type": "mmyolo.YOLOv8PAFPN", "in_channels": [8, 16, 32], "out_channels": [8, 16, 16]},
            "out_channels",
        ),
        ({"type": "mmyolo.YOLOv7PAFPN", "in_channels": [8, 16, 32], "out_channels": [8, 16]}, "out_channels"),
        ({**YOLOX, "norm_cfg": {"type": "GN", "num_groups": 5}}, "norm_cfg/num_groups"),
        ({**YOLOX, "norm_cfg": {"type": "GN"}}, "norm_cfg/num_groups"),
        (
            {
                "type": "mmyolo.YOLOv6CSPRepPAFPN",
                "in_channels": [8, 16, 32],
                "out_channels": [2, 4, 8],
                "hidden_ratio": 0.1,
            },
            "hidden_ratio",
        ),
    ],
)
def test_what_a_yolo_neck_cannot_be_is_refused(raw: dict[str, Any], pointer: str) -> None:
    assert refused(raw)[0] == f"#/neck/{pointer}"


def test_what_training_alone_reads_makes_no_second_yolo_neck() -> None:
    for changed in (
        {"freeze_all": True},
        {"act_cfg": {"type": "SiLU", "inplace": True}},
        {"checkpoint": "a.pth"},
    ):
        assert config(YOLOX, **changed).key() == config(YOLOX).key()


YOLOV7 = {"type": "mmyolo.YOLOv7PAFPN", "in_channels": [8, 16, 32], "out_channels": [4, 8, 16]}


@pytest.mark.parametrize(
    ("changed", "has"),
    [
        ({}, "downsample_layers.0.stride_conv_branches.1.conv.weight"),
        ({}, "out_layers.0.rbr_dense.conv.weight"),
        ({}, "top_down_layers.0.blocks.3.conv.weight"),
        ({"use_repconv_outs": False}, "out_layers.0.conv.weight"),
        ({"use_maxpool_in_downsample": False}, "downsample_layers.0.conv.weight"),
        (
            {
                "block_cfg": {
                    "type": "EELANBlock",
                    "num_elan_block": 2,
                    "middle_ratio": 0.5,
                    "block_ratio": 0.25,
                    "num_convs_in_block": 2,
                }
            },
            "bottom_up_layers.1.e_elan_blocks.1.blocks.1.1.conv.weight",
        ),
    ],
)
def test_the_forms_of_yolov7_run(changed: dict[str, Any], has: str) -> None:
    neck = built(YOLOV7, **changed)
    assert has in neck.state_dict()
    assert [tuple(level.shape) for level in run(neck)] == [(1, 8, 16, 24), (1, 16, 8, 12), (1, 32, 4, 6)]


def test_a_layer_of_yolov7_may_be_normed_and_activated_otherwise_than_the_neck() -> None:
    layer = {"type": "ELANBlock", "middle_ratio": 0.5, "block_ratio": 0.25}
    group = {"norm_cfg": {"type": "GN", "num_groups": 1}}
    names = set(built(YOLOV7, block_cfg={**layer, **group}).state_dict())
    assert {"top_down_layers.0.main_conv.gn.weight", "reduce_layers.0.bn.weight"} <= names
    plain = built(YOLOV7, block_cfg={**layer, "norm_cfg": None}).state_dict()
    assert "top_down_layers.0.main_conv.conv.bias" in plain
    assert refused(YOLOV7, act_cfg=None)[0] == "#/neck/act_cfg"


@pytest.mark.parametrize("name", ["YOLOv5PAFPN", "YOLOv8PAFPN", "YOLOXPAFPN", "CSPNeXtPAFPN"])
def test_a_yolo_neck_without_norms_has_biases(name: str) -> None:
    outputs = 8 if name in ("YOLOXPAFPN", "CSPNeXtPAFPN") else [8, 16, 32]
    raw = {"type": f"mmyolo.{name}", "in_channels": [8, 16, 32], "out_channels": outputs, "norm_cfg": None}
    names = list(built(raw).state_dict())
    assert not [key for key in names if ".bn." in key]
    assert "downsample_layers.0.conv.bias" in names


def test_levels_may_be_enlarged_by_mixed_pixels() -> None:
    mixed = {"scale_factor": 2, "mode": "bilinear", "align_corners": True}
    for library in ("mmdet", "mmyolo"):
        raw = {**YOLOX, "type": f"{library}.CSPNeXtPAFPN"}
        assert config(raw).key() != config(raw, upsample_cfg=mixed).key()
        nearest, smooth = run(built(raw)), run(built(raw, upsample_cfg=mixed))
        assert not torch.allclose(nearest[0], smooth[0])


# --- classifiers ----------------------------------------------------------------------------------


def test_a_linear_neck_takes_the_last_level_only() -> None:
    linear = {"type": "mmpretrain.LinearNeck", "in_channels": 32, "out_channels": 5, "gap_dim": 2}
    described = family("mmpretrain.LinearNeck").describe(config(linear), facts())
    assert described.levels == (LevelFacts(3, "3", "NC", 5, None),)
    (found,) = run(built(linear))
    assert found.shape == (1, 5)
    assert refused(linear, in_channels=16)[1] == "the backbone gives [32], the neck takes [16]"
    assert refused(linear, gap_dim=0)[0] == "#/neck/gap_dim"
    vectors = facts(layout="NC")
    assert (
        family("mmpretrain.LinearNeck").describe(config(linear, gap_dim=0), vectors).levels[0].channels == 5
    )


def test_a_linear_neck_averages_tokens_whose_channels_come_first() -> None:
    linear = {"type": "mmpretrain.LinearNeck", "in_channels": 32, "out_channels": 5}
    tokens = [LevelFacts(11, "11", "NCL", 32, None)]
    neck = family("mmpretrain.LinearNeck").build(config(linear, gap_dim=1), tokens).eval()
    features = torch.randn(2, 32, 7)
    assert torch.allclose(run(neck, [features])[0], run(neck, [features.mean(2, keepdim=True)])[0], atol=1e-6)
    assert refused(linear, tokens, gap_dim=2)[0] == "#/neck/gap_dim"


def test_a_generalised_mean_of_a_large_power_is_the_maximum() -> None:
    pooling = {"type": "mmcls.GeneralizedMeanPooling", "p": 40.0}
    features = [maps.abs() for maps in maps()]
    for level, pooled in zip(features, run(built(pooling), features), strict=True):
        assert torch.allclose(pooled, level.amax((2, 3)), rtol=0.2)


def test_hrnets_levels_become_one() -> None:
    fused = {"type": "mmpretrain.HRFuseScales", "in_channels": [8, 16, 128, 1024], "out_channels": 6}
    levels = facts((8, 16, 128, 1024))
    described = family("mmpretrain.HRFuseScales").describe(config(fused), levels)
    assert described.levels == (LevelFacts(4, "4", "NCHW", 6, 64),)
    neck = family("mmpretrain.HRFuseScales").build(config(fused), levels).eval()
    # The last is as wide as it is to be: no projection.
    assert "increase_layers.2.0.downsample.0.weight" in neck.state_dict()
    assert "increase_layers.3.0.downsample.0.weight" not in neck.state_dict()
    features = [torch.randn(1, level.channels, 16 >> i, 16 >> i) for i, level in enumerate(levels)]
    (found,) = run(neck, features)
    assert found.shape == (1, 6, 2, 2)
