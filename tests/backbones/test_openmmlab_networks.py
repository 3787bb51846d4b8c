"""ConvNeXt, Swin, MobileNets, EfficientNets and their like: what packs of the libraries' outputs do not show."""

from __future__ import annotations

from typing import Any

import httpx
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from service.backbones.base import BackboneConfig, Family
from service.backbones.catalogue import backbone_registry
from service.backbones.swin import from_official
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig
from service.validation import invalid

REGISTRY = backbone_registry()
TINY_CONVNEXT = {
    "type": "mmpretrain.ConvNeXt",
    "arch": {"depths": [1, 1, 1], "channels": [8, 16, 32]},
    "gap_before_final_norm": False,
    "layer_scale_init_value": 1.0,
    "out_indices": [0, 1, 2],
}
TINY_SWIN = {
    "type": "mmdet.SwinTransformer",
    "embed_dims": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "out_indices": [0, 1],
}


def parsed(raw: dict[str, Any]) -> tuple[Family[Any], BackboneConfig]:
    resolved = REGISTRY.resolve(raw["type"])
    context = {"scope": resolved.scope}
    return resolved.family, resolved.family.config.model_validate(
        {**raw, "type": resolved.type}, context=context
    )


def pointer_of(raw: dict[str, Any]) -> str:
    """Where the refusal of a config points."""
    try:
        family, config = parsed(raw)
        config.weights()
        config.levels(family.describe(config))
    except ValidationError as error:
        return invalid(error, "#/backbone").faults[0].pointer
    except InvalidConfig as error:
        return error.faults[0].pointer
    raise AssertionError(f"accepted: {raw}")


def built(raw: dict[str, Any]) -> torch.nn.Module:
    family, config = parsed(raw)
    torch.manual_seed(0)
    return family.build(config).eval()


def outputs(network: torch.nn.Module, size: tuple[int, int], nodes: list[str]) -> dict[str, Tensor]:
    torch.manual_seed(1)
    with torch.inference_mode():
        found: dict[str, Tensor] = network(torch.randn(1, 3, *size), nodes)
    return found


def key(raw: dict[str, Any]) -> str:
    return parsed(raw)[1].key()


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        ({"type": "mmpretrain.ConvNeXt", "arch": "medium"}, "#/backbone/arch"),
        ({**TINY_CONVNEXT, "frozen_stages": 4}, "#/backbone/frozen_stages"),
        ({**TINY_CONVNEXT, "out_indices": [3]}, "#/backbone/out_indices/0"),
        ({**TINY_CONVNEXT, "arch": {"depths": [1], "channels": [8, 16]}}, "#/backbone/arch/channels"),
        ({**TINY_CONVNEXT, "strides": [4, 5]}, "#/backbone/strides/1"),
        ({**TINY_SWIN, "num_heads": [3, 4]}, "#/backbone/num_heads"),
        ({**TINY_SWIN, "frozen_stages": 3}, "#/backbone/frozen_stages"),
        ({**TINY_SWIN, "pretrained": "a.pth", "checkpoint": "b.pth"}, "#/backbone/pretrained"),
        ({"type": "mmpretrain.SwinTransformer", "frozen_stages": 4}, "#/backbone/frozen_stages"),
        (
            {"type": "mmpretrain.MobileNetV3", "arch": "small", "out_indices": [13]},
            "#/backbone/out_indices/0",
        ),
        (
            {"type": "mmpretrain.MobileNetV3", "arch": "small", "frozen_stages": 13},
            "#/backbone/frozen_stages",
        ),
        ({"type": "mmpretrain.MobileNetV2", "widen_factor": 0}, "#/backbone/widen_factor"),
        ({"type": "mmpretrain.EfficientNet", "frozen_stages": -1}, "#/backbone/frozen_stages"),
        ({"type": "mmdet.EfficientNet", "out_indices": [2], "frozen_stages": 4}, "#/backbone/frozen_stages"),
        ({"type": "mmpretrain.EfficientNetV2", "arch": "b0", "out_indices": [8]}, "#/backbone/out_indices/0"),
        ({"type": "mmpretrain.CSPResNeXt", "depth": 50, "frozen_stages": 4}, "#/backbone/frozen_stages"),
        ({"type": "mmpretrain.CSPDarkNet", "depth": 50}, "#/backbone/depth"),
        ({"type": "mmpretrain.VGG", "depth": 11, "dilations": [1, 1]}, "#/backbone/dilations"),
        (
            {"type": "mmpretrain.VGG", "depth": 11, "num_classes": 10, "num_stages": 3},
            "#/backbone/num_classes",
        ),
        ({"type": "mmpretrain.VGG", "depth": 11, "num_classes": 10**9}, "#/backbone/num_classes"),
        ({"type": "mmpretrain.DenseNet", "arch": "120"}, "#/backbone/arch"),
        ({"type": "mmpretrain.RepVGG", "arch": "A0", "strides": [2, 2]}, "#/backbone/strides"),
        ({"type": "mmpretrain.RepVGG", "arch": "a0"}, "#/backbone/arch"),
        ({"type": "mmpretrain.HRNet", "arch": "w18", "out_indices": [0]}, "#/backbone/out_indices"),
        (
            {"type": "mmpretrain.MobileNetV3", "norm_cfg": {"type": "GN", "num_groups": 7}},
            "#/backbone/norm_cfg/num_groups",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_its_key(raw: dict[str, Any], pointer: str) -> None:
    assert pointer_of(raw) == pointer


@pytest.mark.parametrize(
    ("raw", "same"),
    [
        (
            TINY_CONVNEXT,
            {"drop_path_rate": 0.4, "frozen_stages": 2, "with_cp": True, "out_indices": [2, 1, 0]},
        ),
        (TINY_SWIN, {"drop_path_rate": 0.3, "frozen_stages": 1, "pretrain_img_size": 384}),
        ({"type": "mmpretrain.MobileNetV3"}, {"arch": "small", "out_indices": [3, 8], "norm_eval": True}),
        ({"type": "mmpretrain.EfficientNet"}, {"drop_path_rate": 0.2, "out_indices": [1]}),
        ({"type": "mmpretrain.DenseNet"}, {"memory_efficient": True, "drop_rate": 0.1}),
    ],
)
def test_keys_of_training_and_of_the_reply_share_a_model(raw: dict[str, Any], same: dict[str, Any]) -> None:
    assert key({**raw, **same}) == key(raw)


def test_scopes_share_a_network_with_the_same_names_and_no_other() -> None:
    own = {"arch": "b0", "out_indices": [6]}
    assert key({"type": "mmdet.EfficientNet", **own}) == key({"type": "mmpretrain.EfficientNet", **own})
    assert key({"type": "mmdet.MobileNetV2"}) != key({"type": "mmpretrain.MobileNetV2"})


def test_levels_by_stride_have_norms_and_are_maps() -> None:
    raw = {"type": "ConvNeXt", "arch": TINY_CONVNEXT["arch"], "strides": [4, 16]}
    family, config = parsed(raw)
    levels = config.levels(family.describe(config))
    found = outputs(built(raw), (64, 32), [level.node for level in levels])
    assert [tuple(found[level.node].shape) for level in levels] == [(1, 8, 16, 8), (1, 32, 4, 2)]


def test_mmdets_strides_spell_the_merging_or_ask_for_levels() -> None:
    def indices(strides: list[int]) -> list[int]:
        family, config = parsed({**TINY_SWIN, "out_indices": [1], "strides": strides})
        return [level.index for level in config.levels(family.describe(config))]

    assert indices([4, 2]) == [1]
    assert indices([4, 8]) == [0, 1]


@pytest.mark.parametrize("raw", [TINY_CONVNEXT, TINY_SWIN])
def test_a_classifiers_file_lacks_the_earlier_norms_and_a_damaged_one_is_refused(raw: dict[str, Any]) -> None:
    family, config = parsed(raw)
    last = "norm2" if "ConvNeXt" in raw["type"] else "norm1"
    state = {f"backbone.{name}": tensor for name, tensor in built(raw).state_dict().items()}
    early = [name for name in state if name.startswith("backbone.norm") and last not in name]
    classifiers = {name: tensor for name, tensor in state.items() if name not in early}
    network, keys = family.load(config, classifiers, WeightsRef("any", "backbone."))
    assert list(keys.missing) == [name.removeprefix("backbone.") for name in early]
    assert torch.equal(network.norm0.weight, torch.ones(8))
    for damaged in ({**state}, {**classifiers}):
        damaged.pop(f"backbone.{last}.bias" if damaged.keys() == classifiers.keys() else early[0])
        with pytest.raises(CheckpointMismatch):
            family.load(config, damaged, WeightsRef("any", "backbone."))


def test_an_official_file_is_read_only_where_the_config_says_so() -> None:
    ours = {**built(TINY_SWIN).state_dict()}
    official = {
        "layers.0.blocks.0.attn.qkv.weight": ours["stages.0.blocks.0.attn.w_msa.qkv.weight"],
        "layers.0.blocks.1.mlp.fc1.bias": ours["stages.0.blocks.1.ffn.layers.0.0.bias"],
        "patch_embed.proj.weight": ours["patch_embed.projection.weight"],
        "layers.0.downsample.norm.bias": torch.arange(8.0),
    }
    renamed = from_official(official)
    assert renamed.keys() - {"stages.0.downsample.norm.bias"} <= ours.keys()
    # neighbours (0,0), (1,0), (0,1), (1,1) of two channels, to channels of neighbours in reading order
    assert renamed["stages.0.downsample.norm.bias"].tolist() == [0, 4, 2, 6, 1, 5, 3, 7]
    assert from_official(ours) == ours
    family, config = parsed(TINY_SWIN)
    with pytest.raises(CheckpointMismatch):
        family.load(config, official, WeightsRef("any"))


def test_an_index_table_of_the_file_is_counted_and_never_taken() -> None:
    family, config = parsed(TINY_SWIN)
    network = built(TINY_SWIN)
    name = "stages.0.blocks.0.attn.w_msa.relative_position_index"
    table = dict(network.named_buffers())[name]
    state = {**network.state_dict(), name: table.clone()}
    assert family.load(config, state, WeightsRef("any"))[1].unexpected == ()
    state[name] = torch.full_like(table, 10**6)
    loaded, keys = family.load(config, state, WeightsRef("any"))
    assert keys.unexpected == (name,)
    assert torch.equal(dict(loaded.named_buffers())[name], table)


def test_a_map_smaller_than_a_window_needs_padding_in_mmpretrain() -> None:
    arch = {"embed_dims": 8, "depths": [2, 2], "num_heads": [2, 4]}
    raw = {"type": "mmpretrain.SwinTransformer", "arch": arch, "window_size": 4, "out_indices": [1]}
    with pytest.raises(InvalidConfig, match="pad_small_map"):
        outputs(built(raw), (16, 16), ["1"])
    assert outputs(built({**raw, "pad_small_map": True}), (16, 16), ["1"])["1"].shape == (1, 16, 2, 2)


def test_odd_sizes_reach_every_branch_and_stage() -> None:
    hrnet = outputs(built({"type": "HRNet", "arch": "w18"}), (75, 101), ["0", "3"])
    assert [tuple(found.shape[2:]) for found in hrnet.values()] == [(19, 26), (3, 4)]
    swin = outputs(built(TINY_SWIN), (45, 70), ["0", "1"])
    assert [tuple(found.shape[2:]) for found in swin.values()] == [(12, 18), (6, 9)]


def test_the_classes_of_a_vgg_come_last_from_images_of_one_size(http: httpx.Client) -> None:
    classified = {"type": "VGG", "depth": 11, "num_classes": 10}
    for indices, names in (
        (None, ["5"]),
        ([0, 3], ["0", "3", "5"]),
        ([5, 1], ["1", "5"]),
        ([-1], ["5"]),
    ):
        told = http.post(
            "/backbones/inspect", json={"backbone": {**classified, "out_indices": indices}}
        ).json()
        assert [level["name"] for level in told["levels"]] == names
        assert told["levels"][-1]["shape"] == [1, 10]
        assert told["levels"][-1]["layout"] == "NC"
    refused = http.post("/backbones/inspect", json={"backbone": classified, "input_size": [256, 256]})
    assert refused.status_code == 422
    assert [fault["pointer"] for fault in refused.json()["errors"]] == ["#/backbone/num_classes"]
