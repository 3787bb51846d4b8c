"""mmdet's and mmyolo's necks of their own kinds: their formulas on small maps, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from service.necks.base import LevelFacts
from service.necks.carafe import reassembled
from service.necks.dyhead import SpatialConv
from service.necks.nas_fpn import resized
from tests.necks.levels import built, config, described, facts, refused, run, tensors


def strides(raw: dict[str, Any], levels: list[LevelFacts]) -> list[int | None]:
    return [level.stride for level in described(raw, levels).levels]


def sizes(found: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(level.shape[1:]) for level in found]


# --- BFP ------------------------------------------------------------------------------------------

BFP = {"type": "mmdet.BFP", "in_channels": 4, "num_levels": 3, "refine_level": 1}
EQUAL = facts([4, 4, 4])


def test_balanced_levels_are_each_with_the_mean_of_all() -> None:
    features = tensors(EQUAL)
    size = features[1].shape[2:]
    mean = (F.max_pool2d(features[0], 2) + features[1] + F.interpolate(features[2], size=size)) / 3
    found = run(built(BFP, EQUAL), features)
    for level, expected in zip(
        found, (F.interpolate(mean, size=(16, 24)), mean, F.max_pool2d(mean, 2)), strict=True
    ):
        own = features[sizes(found).index(tuple(level.shape[1:]))]
        assert torch.allclose(level, own + expected, atol=1e-6)


def test_the_mean_of_levels_may_be_refined_over_all_places() -> None:
    neck = built({**BFP, "refine_type": "non_local"}, EQUAL)
    refine = neck.get_submodule("refine")
    maps = tensors(EQUAL)[2]
    asked, known, held = (refine.get_submodule(name)(maps).flatten(2) for name in ("theta", "phi", "g"))
    weights = (asked.transpose(1, 2) @ known).softmax(-1)
    mixed = (held @ weights.transpose(1, 2)).reshape(maps.shape)
    expected = maps + refine.get_submodule("conv_out")(mixed)
    assert torch.allclose(refine(maps), expected, atol=1e-5)


def test_a_norm_of_no_refinement_makes_no_second_neck() -> None:
    assert config(BFP).key() == config({**BFP, "norm_cfg": {"type": "BN"}}).key()
    refined = {**BFP, "refine_type": "conv"}
    assert config(refined).key() != config({**refined, "norm_cfg": {"type": "BN"}}).key()


# --- SSD ------------------------------------------------------------------------------------------

SSD = {
    "type": "mmdet.SSDNeck",
    "in_channels": [4, 6],
    "out_channels": [4, 6, 8, 6],
    "level_strides": [2, 1],
    "level_paddings": [1, 0],
}


def test_ssds_first_level_is_normed_and_the_extra_ones_go_on_from_the_last() -> None:
    levels = facts([4, 6])
    features = tensors(levels)
    neck = built(SSD, levels)
    found = run(neck, features)
    assert sizes(found) == [(4, 16, 24), (6, 8, 12), (8, 4, 6), (6, 2, 4)]
    assert strides(SSD, levels) == [4, 8, 16, 16]
    assert torch.allclose(found[0], 20 * F.normalize(features[0], dim=1), atol=1e-4)
    assert torch.equal(found[1], features[1])
    plain = built({**SSD, "l2_norm_scale": None}, levels)
    assert "l2_norm.weight" not in plain.state_dict()
    assert torch.equal(run(plain, features)[0], features[0])


def test_ssds_convolutions_may_be_separable() -> None:
    levels = facts([4, 6])
    neck = built({**SSD, "use_depthwise": True, "norm_cfg": {"type": "BN"}}, levels)
    assert "extra_layers.0.1.depthwise_conv.bn.weight" in neck.state_dict()
    assert sizes(run(neck, tensors(levels)))[2:] == [(8, 4, 6), (6, 2, 4)]


# --- SSH, YOLOF, CenterNet ------------------------------------------------------------------------


def test_ssh_puts_three_views_beside_each_other() -> None:
    raw = {"type": "mmdet.SSH", "num_scales": 2, "in_channels": [4, 6], "out_channels": [8, 4]}
    levels = facts([4, 6])
    found = run(built(raw, levels), tensors(levels))
    assert sizes(found) == [(8, 16, 24), (4, 8, 12)]
    assert found[0].min() == 0
    assert strides(raw, levels) == [4, 8]


def test_a_dilated_encoder_takes_the_last_level() -> None:
    raw = {
        "type": "mmdet.DilatedEncoder",
        "in_channels": 6,
        "out_channels": 4,
        "block_mid_channels": 2,
        "num_residual_blocks": 2,
        "block_dilations": [3, 5, 7],
    }
    levels = facts([4, 6])
    neck = built(raw, levels)
    convs = [neck.get_parameter(f"dilated_encoder_blocks.{i}.conv2.conv.weight") for i in range(2)]
    assert [tuple(conv.shape) for conv in convs] == [(2, 2, 3, 3)] * 2
    assert "dilated_encoder_blocks.2.conv1.conv.weight" not in neck.state_dict()
    assert sizes(run(neck, tensors(levels))) == [(4, 8, 12)]
    assert strides(raw, levels) == [8]
    other = {**raw, "block_dilations": [3, 5]}
    assert config(other).key() == config(raw).key()


CENTER = {"type": "mmdet.CTResNetNeck", "in_channels": 6, "num_deconv_filters": [5, 3]}


def test_centernets_steps_double_the_last_level() -> None:
    raw, levels = {**CENTER, "num_deconv_kernels": [4, 4], "use_dcn": False}, facts([4, 4, 6])
    assert sizes(run(built(raw, levels), tensors(levels))) == [(3, 16, 24)]
    assert strides(raw, levels) == [4]
    pointer, detail = refused(raw, [LevelFacts(0, "0", "NCHW", 6, 2)])
    assert pointer == "#/neck/num_deconv_filters"
    assert detail == "2 steps make a level of stride 2 larger than the image"


def test_a_deformable_convolution_without_offsets_is_half_of_a_plain_one() -> None:
    levels = facts([4, 4, 6])
    deformable = built({**CENTER, "num_deconv_kernels": [4, 4]}, levels)
    conv = deformable.get_submodule("deconv_layers.0.conv")
    state = conv.state_dict()
    assert list(state) == ["weight", "conv_offset.weight", "conv_offset.bias"]
    conv.load_state_dict(
        {name: torch.zeros_like(state[name]) for name in state} | {"weight": state["weight"]}
    )
    maps = tensors(levels)[-1]
    with torch.inference_mode():
        found = conv(maps)
    assert torch.allclose(found, F.conv2d(maps, state["weight"], padding=1) / 2, atol=1e-5)


# --- pyramids -------------------------------------------------------------------------------------

NAS = {
    "type": "mmdet.NASFPN",
    "in_channels": [4, 6, 8],
    "out_channels": 4,
    "num_outs": 5,
    "stack_times": 2,
    "norm_cfg": {"type": "BN"},
}


def test_levels_are_merged_at_a_size_by_the_nearest_or_by_the_largest_pixel() -> None:
    maps = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    assert resized(maps, (3, 4)) is maps
    assert torch.equal(resized(maps, (6, 8)), F.interpolate(maps, scale_factor=2))
    # 3 rows are padded to 4 below, 4 columns need no more.
    assert torch.equal(resized(maps, (2, 2)), torch.tensor([[[[6.0, 8], [10, 12]]]]))


def test_nas_fpn_has_five_levels() -> None:
    levels = facts([4, 6, 8])
    found = run(built(NAS, levels), tensors(levels))
    assert sizes(found) == [(4, 16, 24), (4, 8, 12), (4, 4, 6), (4, 2, 3), (4, 1, 1)]
    assert strides(NAS, levels) == [4, 8, 16, 32, 64]
    none = run(built({**NAS, "stack_times": 0}, levels), tensors(levels))
    assert sizes(none) == sizes(found)


NAS_FCOS = {
    "type": "mmdet.NASFCOS_FPN",
    "in_channels": [4, 6, 8, 10],
    "out_channels": 4,
    "num_outs": 5,
    "norm_cfg": {"type": "BN"},
    "conv_cfg": {"type": "DCNv2", "deform_groups": 2},
}


def test_nas_fcos_gives_the_second_to_the_fourth_level_and_those_above() -> None:
    levels = facts([4, 6, 8, 10])
    neck = built(NAS_FCOS, levels)
    found = run(neck, tensors(levels))
    assert sizes(found) == [(4, 8, 12), (4, 4, 6), (4, 2, 3), (4, 1, 2), (4, 1, 1)]
    assert strides(NAS_FCOS, levels) == [8, 16, 32, 64, 128]
    offsets = neck.get_parameter("fpn.c22_1.input1_conv.conv.conv_offset.weight")
    assert offsets.shape == (2 * 3 * 9, 4, 3, 3)
    assert list(neck.get_submodule("fpn.c32.input2_conv").state_dict()) == []


def test_the_first_extra_level_of_nas_fcos_is_not_rectified() -> None:
    levels = facts([4, 6, 8, 10])
    neck = built(NAS_FCOS, levels)
    found = run(neck, tensors(levels))
    with torch.inference_mode():
        fourth, fifth = (neck.get_submodule(f"extra_downsamples.{i}.conv") for i in range(2))
        assert torch.equal(fourth(found[2]), found[3])
        assert torch.equal(fifth(F.relu(found[3])), found[4])


# --- CARAFE ---------------------------------------------------------------------------------------

CARAFE = {"type": "mmdet.FPN_CARAFE", "in_channels": [4, 6], "out_channels": 4, "num_outs": 3}


def test_content_enlarges_a_level_by_what_surrounds_each_pixel() -> None:
    maps = torch.arange(1.0, 13).reshape(1, 1, 3, 4)
    weights = torch.zeros(1, 1, 9, 6, 8)
    weights[:, :, 4] = 1  # the pixel itself
    assert torch.equal(reassembled(maps, weights), F.interpolate(maps, scale_factor=2))
    weights[:, :, 4], weights[:, :, 5] = 0, 1  # the one to its right, outside of the map 0
    right = F.pad(maps[..., 1:], (0, 1))
    assert torch.equal(reassembled(maps, weights), F.interpolate(right, scale_factor=2))
    two = torch.cat((maps, maps), 1)
    both = torch.cat((torch.zeros_like(weights), weights), 1)
    assert torch.equal(reassembled(two, both)[:, 1:], F.interpolate(right, scale_factor=2))
    assert reassembled(two, both)[:, 0].abs().max() == 0


def test_a_pyramid_enlarged_by_content_crops_what_is_too_large() -> None:
    levels = facts([4, 6])
    neck = built(CARAFE, levels)
    features = [torch.randn(1, 4, 9, 7), torch.randn(1, 6, 5, 4)]
    assert sizes(run(neck, features)) == [(4, 9, 7), (4, 5, 4), (4, 3, 2)]
    assert list(neck.get_submodule("upsample_modules.1").state_dict()) == [
        "channel_compressor.weight",
        "channel_compressor.bias",
        "content_encoder.weight",
        "content_encoder.bias",
    ]
    assert "upsample_modules" not in "".join(
        built({**CARAFE, "upsample_cfg": {"type": "nearest"}}, levels).state_dict()
    )


FPG = {
    "type": "mmdet.FPG",
    "in_channels": [4, 6, 8],
    "out_channels": 5,
    "inter_channels": 4,
    "num_outs": 3,
    "stack_times": 1,
    "paths": ["bu"],
    "across_down_trans": {"type": "interpolation_conv"},
    "across_skip_trans": None,
    "skip_inds": [[0], [], [0]],
}


def test_a_grid_sums_what_leads_to_a_place() -> None:
    levels = facts([4, 6, 8])
    neck = built(FPG, levels)
    features = tensors(levels)
    lateral = [neck.get_submodule(f"lateral_convs.{i}")(maps) for i, maps in enumerate(features)]
    ways = neck.get_submodule("fpn_transitions.0.1")
    with torch.inference_mode():
        middle = ways.get_submodule("same_up")(lateral[0])
        middle = middle + ways.get_submodule("across_lateral")(lateral[1])
        middle = middle + ways.get_submodule("across_down.conv")(F.interpolate(lateral[2], scale_factor=2))
        outs = [neck.get_submodule(f"output_transition.{i}") for i in range(3)]
        expected = [out(maps) for out, maps in zip(outs, (lateral[0], middle, lateral[2]), strict=True)]
    for level, wanted in zip(run(neck, features), expected, strict=True):
        assert torch.allclose(level, wanted, atol=1e-5)
    assert not any(name.startswith("fpn_transitions.0.0") for name in neck.state_dict())


def test_a_transition_may_norm_before_it_convolves() -> None:
    levels = facts([4, 6, 8])
    step = {"type": "conv", "kernel_size": 1, "norm_cfg": {"type": "BN"}, "order": ["norm", "act", "conv"]}
    neck = built({**FPG, "across_lateral_trans": step}, levels)
    maps = torch.randn(1, 4, 2, 2)
    way = neck.get_submodule("fpn_transitions.0.1.across_lateral")
    with torch.inference_mode():
        expected = way.get_submodule("conv")(F.relu(way.get_submodule("bn")(maps)))
        assert torch.equal(way(maps), expected)


def test_the_lowest_level_of_yolov6_3_comes_out_only_in_the_others() -> None:
    raw = {
        "type": "mmyolo.YOLOv6RepBiPAFPN",
        "in_channels": [4, 6, 8, 10],
        "out_channels": [2, 4, 6],
        "deepen_factor": 0.1,
    }
    levels = facts([4, 6, 8, 10])
    neck, features = built(raw, levels), tensors(levels)
    found = run(neck, features)
    assert sizes(found) == [(2, 8, 12), (4, 4, 6), (6, 2, 3)]
    assert strides(raw, levels) == [8, 16, 32]
    features[0] = features[0] + 1
    assert not torch.allclose(run(neck, features)[0], found[0])
    pointer, detail = refused(raw, levels[1:])
    assert (pointer, detail) == (
        "#/neck/in_channels",
        "the backbone gives [6, 8, 10], the neck takes [4, 6, 8, 10], widened to [4, 6, 8, 10]",
    )


# --- DyHead ---------------------------------------------------------------------------------------


def test_dyhead_keeps_every_levels_size() -> None:
    raw = {"type": "mmdet.DyHead", "in_channels": 4, "out_channels": 16, "num_blocks": 2}
    found = run(built(raw, EQUAL), tensors(EQUAL))
    assert sizes(found) == [(16, 16, 24), (16, 8, 12), (16, 4, 6)]
    assert config(raw).key() == config({**raw, "zero_init_offset": False}).key()


def test_dyhead_takes_levels_that_halve() -> None:
    neck = built({"type": "mmdet.DyHead", "in_channels": 4, "out_channels": 16}, EQUAL[:2])
    with pytest.raises(ValueError, match="is not half of"):
        run(neck, [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 5, 4)])
    odd = [torch.randn(1, 4, 9, 7), torch.randn(1, 4, 5, 4)]
    assert sizes(run(neck, odd)) == [(16, 9, 7), (16, 5, 4)]
    on_meta = [maps.to("meta") for maps in odd]
    assert sizes(run(neck, on_meta)) == [(16, 9, 7), (16, 5, 4)]


def test_offsets_of_a_larger_level_are_read_from_the_first_number_on() -> None:
    torch.manual_seed(0)
    conv = SpatialConv(4, 16).eval()
    maps, offset, mask = torch.randn(2, 4, 3, 4), torch.randn(2, 18, 6, 8), torch.rand(2, 9, 6, 8)
    with torch.inference_mode():
        found = conv(maps, offset, mask)
        same = conv(
            maps, offset.flatten(1)[:, :216].view(2, 18, 3, 4), mask.flatten(1)[:, :108].view(2, 9, 3, 4)
        )
    assert torch.equal(found, same)
    with pytest.raises(ValueError, match="do not do for"):
        conv(maps, offset[..., :1, :1], mask[..., :1, :1])


# --- mmdet.GlobalAveragePooling -------------------------------------------------------------------


def test_a_pooling_of_windows_puts_them_beside_each_other() -> None:
    raw = {"type": "mmdet.GlobalAveragePooling", "kernel_size": [8, 24]}
    levels = facts([4])
    (maps,) = tensors(levels)
    (found,) = run(built(raw, levels), [maps])
    assert torch.allclose(found, maps.reshape(2, 4, 2, 8, 24).mean((3, 4)).flatten(1), atol=1e-6)
    (whole,) = run(built({"type": "mmdet.GlobalAveragePooling"}, levels), [maps])
    assert torch.allclose(whole, maps.mean((2, 3)), atol=1e-6)


TWICE = {"scale_factor": 2, "align_corners": True}


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ({**BFP, "refine_level": 3}, "refine_level"),
        ({**SSD, "level_strides": [2]}, "level_strides"),
        ({**SSD, "out_channels": [4, 8, 6]}, "out_channels"),
        ({**SSD, "out_channels": [4, 6]}, "out_channels"),
        ({"type": "mmdet.SSH", "num_scales": 1, "in_channels": [4], "out_channels": [6]}, "out_channels/0"),
        ({"type": "mmdet.SSH", "num_scales": 2, "in_channels": [4], "out_channels": [4]}, "in_channels"),
        ({**CENTER, "num_deconv_kernels": [4]}, "num_deconv_kernels"),
        ({**FPG, "paths": ["bu", "bu"]}, "paths"),
        ({**NAS_FCOS, "in_channels": [4, 6, 8], "start_level": 0}, "in_channels"),
        ({**NAS_FCOS, "start_level": 2}, "start_level"),
        ({**NAS_FCOS, "conv_cfg": {"type": "DCNv2", "deform_groups": 3}}, "conv_cfg/deform_groups"),
        ({**CARAFE, "upsample_cfg": {"type": "carafe", "up_group": 3}}, "upsample_cfg/up_group"),
        ({**FPG, "skip_inds": [[0]]}, "skip_inds"),
        ({**FPG, "paths": ["td"], "skip_inds": [[0], [], []]}, "skip_inds"),
        ({**FPG, "inter_channels": [4, 4]}, "inter_channels"),
        (
            {**FPG, "across_lateral_trans": {"type": "conv", "kernel_size": 1, "order": ["conv"] * 3}},
            "across_lateral_trans/order",
        ),
        ({"type": "mmdet.DyHead", "in_channels": 4, "out_channels": 8}, "out_channels"),
        ({"type": "mmdet.GlobalAveragePooling", "stride": 2}, "stride"),
        (
            {"type": "mmdet.YOLOXPAFPN", "in_channels": [4, 4], "out_channels": 4, "upsample_cfg": TWICE},
            "upsample_cfg/align_corners",
        ),
    ],
)
def test_what_a_detectors_neck_cannot_be_is_refused(raw: dict[str, Any], pointer: str) -> None:
    assert refused(raw, EQUAL)[0] == f"#/neck/{pointer}"
