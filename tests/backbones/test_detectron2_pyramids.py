"""detectron2's pyramids and what goes into them: spellings, what is refused where, one checkpoint for both."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from service.backbones.catalogue import backbone_registry
from service.backbones.detectron2_fpn import FPN_FAMILY
from service.backbones.vitdet_layers import attend, merge_windows, split_windows
from service.config.files import ConfigCatalogue
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, ServiceError
from service.necks.catalogue import neck_registry
from service.runtime.plan import Planner
from tests.processes import ROOT

STAGES = ["res2", "res3", "res4", "res5"]
RESNET = {"type": "detectron2.ResNet", "depth": 18, "out_features": STAGES}
FPN: dict[str, Any] = {
    "type": "detectron2.FPN",
    "bottom_up": RESNET,
    "in_features": STAGES,
    "out_channels": 8,
    "top_block": "LastLevelMaxPool",
}
VIT = {"type": "detectron2.ViT", "img_size": 64, "embed_dim": 16, "depth": 1, "num_heads": 2}
SIMPLE: dict[str, Any] = {
    "type": "detectron2.SimpleFeaturePyramid",
    "net": VIT,
    "out_channels": 8,
    "scale_factors": [2.0, 1.0, 0.5],
}
MVIT = {"type": "detectron2.MViT", "embed_dim": 8, "depth": 4, "last_block_indexes": [0, 1, 2, 3]}
SWIN = {"type": "detectron2.SwinTransformer", "depths": [1, 1], "num_heads": [3, 6], "out_indices": [0, 1]}
REGNET: dict[str, Any] = {
    "type": "detectron2.RegNet",
    "stem_class": "SimpleStem",
    "stem_width": 32,
    "block_class": "ResBottleneckBlock",
    "depth": 5,
    "w_a": 30.0,
    "w_0": 32,
    "w_m": 2.5,
    "group_width": 16,
}


@pytest.fixture(scope="module")
def planner() -> Planner:
    return Planner(backbone_registry(), neck_registry(), ConfigCatalogue(ROOT / "model_configs"))


def refused_at(planner: Planner, backbone: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        planner.plan(backbone)
    return caught.value.faults[0].pointer


# --- spellings ------------------------------------------------------------------------------------


def test_a_lazyconfig_with_references_is_the_flat_spelling(planner: Planner) -> None:
    written = {
        "_target_": "detectron2.modeling.backbone.fpn.FPN",
        "bottom_up": {"_target_": "detectron2.modeling.ResNet", "depth": 18, "out_features": STAGES},
        "in_features": "${.bottom_up.out_features}",
        "out_channels": 8,
        "top_block": {
            "_target_": "detectron2.modeling.backbone.fpn.LastLevelP6P7",
            "in_channels": 512,
            "out_channels": "${..out_channels}",
        },
    }
    flat = {**FPN, "top_block": {"type": "LastLevelP6P7"}}
    first, second = planner.plan(written), planner.plan(flat)
    assert first.config.key() == second.config.key()
    assert [level.name for level in first.levels] == ["p2", "p3", "p4", "p5", "p6", "p7"]


def test_yacs_names_its_builder(planner: Planner) -> None:
    model = {"RESNETS": {"OUT_FEATURES": STAGES[1:]}, "FPN": {"IN_FEATURES": STAGES[1:]}}
    name = "build_retinanet_resnet_fpn_backbone"
    by_name = planner.plan({"MODEL": {**model, "BACKBONE": {"NAME": name}}})
    assert by_name.type == f"detectron2.{name}"
    assert by_name.config.key() == planner.plan({"builder": name, "MODEL": model}).config.key()
    plain = planner.plan({"type": "detectron2.build_resnet_fpn_backbone", "MODEL": model})
    assert plain.config.key() != by_name.config.key()


@pytest.mark.parametrize(
    "reference", ["${.nothing}", "${.bottom_up}", "${.bottom_up.depth.more}", "${...out_channels}"]
)
def test_a_reference_to_nothing_is_refused(reference: str, planner: Planner) -> None:
    assert refused_at(planner, {**FPN, "in_features": reference}) == "#/backbone/in_features"


def test_the_same_levels_by_stride_share_the_model(planner: Planner) -> None:
    chosen = planner.plan({**FPN, "strides": [64, 8]})
    assert [level.name for level in chosen.levels] == ["p6", "p3"]
    assert chosen.config.key() == planner.plan({**FPN, "square_pad": 64}).config.key()


# --- what is refused, and where -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"in_features": ["res2", "res4"]}, "in_features"),
        ({"in_features": ["res3", "res9"]}, "in_features/1"),
        ({"in_features": STAGES[:2]}, "top_block"),  # no p5 for the max pool
        ({"norm": "GN"}, "norm"),
        ({"top_block": {"type": "LastLevelP6P7", "in_channels": 3}}, "top_block/in_channels"),
        ({"bottom_up": {**RESNET, "depth": 19}}, "bottom_up/depth"),
        ({"bottom_up": {**RESNET, "num_groups": 2}}, "bottom_up/num_groups"),
        ({"bottom_up": {**RESNET, "checkpoint": "R-18.pth"}}, "bottom_up"),
        ({"bottom_up": FPN}, "bottom_up/type"),
        ({"bottom_up": {"type": "mmpretrain.ResNet", "depth": 18}}, "bottom_up/type"),
        ({"bottom_up": "detectron2/resnet50"}, "bottom_up"),
        ({"bottom_up": {"_target_": "subprocess.Popen"}}, "bottom_up/_target_"),
        ({"top_block": {"_target_": "os.system"}}, "top_block/_target_"),
        ({"out_channels": 10**9}, "out_channels"),
    ],
)
def test_what_an_fpn_does_not_take_is_refused_where_it_is(
    change: dict[str, Any], key: str, planner: Planner
) -> None:
    assert refused_at(planner, {**FPN, **change}) == f"#/backbone/{key}"


@pytest.mark.parametrize(
    ("backbone", "key"),
    [
        ({**SIMPLE, "scale_factors": [2.0, 0.5]}, "scale_factors"),
        ({**SIMPLE, "scale_factors": [1.5]}, "scale_factors/0"),
        ({**SIMPLE, "scale_factors": [4.0, 2.0], "norm": ""}, "norm"),
        ({**SIMPLE, "in_feature": "other"}, "in_feature"),
        ({**SIMPLE, "net": {**VIT, "num_heads": 3}}, "net/num_heads"),
        ({**VIT, "use_rel_pos": True, "img_size": 8}, "img_size"),
        ({**VIT, "norm_layer": "torch.nn.BatchNorm2d"}, "norm_layer"),
        ({**MVIT, "last_block_indexes": [0, 2, 1]}, "last_block_indexes"),
        ({**MVIT, "out_features": ["scale9"]}, "out_features/0"),
        ({**MVIT, "adaptive_window_size": 2}, "adaptive_window_size"),
        ({**MVIT, "embed_dim": 4096}, "embed_dim"),
        ({**SWIN, "frozen_stages": 4}, "frozen_stages"),
        ({**SWIN, "num_heads": [5, 6]}, "num_heads"),
        ({**REGNET, "norm": ""}, "norm"),
        ({**REGNET, "out_features": ["s7"]}, "out_features/0"),
        ({**REGNET, "bottleneck_ratio": 2.5}, "bottleneck_ratio"),
        ({**REGNET, "stem_class": "subprocess.Popen"}, "stem_class"),
        ({**REGNET, "depth": 128, "w_a": 1000.0, "w_m": 1.01}, "depth"),
    ],
)
def test_what_the_others_do_not_take_is_refused_where_it_is(
    backbone: dict[str, Any], key: str, planner: Planner
) -> None:
    assert refused_at(planner, backbone) == f"#/backbone/{key}"


def test_backbones_inside_each_other_without_end_are_refused(planner: Planner) -> None:
    backbone: dict[str, Any] = RESNET
    for _ in range(200):
        backbone = {**FPN, "bottom_up": backbone}
    assert refused_at(planner, backbone).startswith("#/backbone/bottom_up/bottom_up")


def test_an_image_that_does_not_halve_to_the_end_is_refused(planner: Planner) -> None:
    plan = planner.plan(FPN)
    assert len(planner.levels_at(plan, (64, 96))) == 5
    with pytest.raises(InvalidConfig, match="65x64"):
        planner.levels_at(plan, (65, 64))


# --- one checkpoint -------------------------------------------------------------------------------


def test_one_file_fills_the_pyramid_and_what_is_inside() -> None:
    config = FPN_FAMILY.config.model_validate(FPN)
    torch.manual_seed(0)
    state = {f"backbone.{name}": tensor for name, tensor in FPN_FAMILY.build(config).state_dict().items()}
    state["roi_heads.weight"] = torch.zeros(1)
    state["backbone.bottom_up.linear.weight"] = torch.zeros(1)
    made, keys = FPN_FAMILY.load(config, state, WeightsRef("any"))
    assert (keys.prefix, keys.missing) == ("backbone.", ())
    assert set(keys.unexpected) == {"roi_heads.weight", "backbone.bottom_up.linear.weight"}
    assert keys.loaded == len(made.state_dict()) == len(state) - 2


@pytest.mark.parametrize("name", ["fpn_lateral3.weight", "bottom_up.res2.0.conv1.weight"])
def test_a_weight_that_is_missing_anywhere_is_named(name: str) -> None:
    config = FPN_FAMILY.config.model_validate(FPN)
    state = {key: tensor for key, tensor in FPN_FAMILY.build(config).state_dict().items() if key != name}
    with pytest.raises(CheckpointMismatch) as caught:
        FPN_FAMILY.load(config, state, WeightsRef("any"))
    assert caught.value.missing == (name,)


def test_a_file_of_the_backbone_alone_is_refused() -> None:
    config = FPN_FAMILY.config.model_validate(FPN)
    made = FPN_FAMILY.build(config).get_submodule("bottom_up")
    with pytest.raises(CheckpointMismatch):
        FPN_FAMILY.load(config, made.state_dict(), WeightsRef("any"))


# --- layers ---------------------------------------------------------------------------------------


def test_windows_come_back_as_they_were() -> None:
    maps = torch.arange(2 * 5 * 7 * 3.0).reshape(2, 5, 7, 3)
    windows, padded = split_windows(maps, 4)
    assert (windows.shape, padded) == ((8, 4, 4, 3), (8, 8))
    assert torch.equal(merge_windows(windows, padded, (5, 7)), maps)


def test_queries_taken_in_turns_attend_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 2, 12, 4)
    tables = (torch.randn(5, 4), torch.randn(7, 4))
    whole = attend(query, key, value, tables, (3, 4), (3, 4))
    monkeypatch.setattr("service.backbones.vitdet_layers.MAX_BIASES", 2 * 2 * 12 * 5)
    torch.testing.assert_close(attend(query, key, value, tables, (3, 4), (3, 4)), whole)


def test_relative_positions_move_with_the_map() -> None:
    """A table that is nothing but at one row above draws each place to the one above it."""
    height = torch.full((5, 1), -50.0)
    height[3] = 50.0
    query, key = torch.ones(1, 1, 3, 1), torch.zeros(1, 1, 3, 1)
    value = torch.tensor([1.0, 2.0, 3.0]).reshape(1, 1, 3, 1)
    found = attend(query, key, value, (height, torch.zeros(1, 1)), (3, 1), (3, 1)).flatten()
    torch.testing.assert_close(found[1:], torch.tensor([1.0, 2.0]))
