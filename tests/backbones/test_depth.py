"""Only what the deepest level asked for needs is computed, counted in multiplications on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from service.backbones import building
from service.backbones.base import Backbone, BackboneConfig
from service.backbones.catalogue import TYPES, backbone_registry
from service.config.spec import Description, FeatureInfo

# timm by its kinds of wrapper, torchvision by kinds of graph; all types of the other libraries.
SAMPLED = (
    "timm.resnet18",
    "timm.vgg11",
    "timm.vit_tiny_patch16_224",
    "timm.swin_tiny_patch4_window7_224",
    "timm.efficientnet_b0",
    "timm.mobilenetv3_small_050",
    "timm.hrnet_w18_small",
    "timm.xception41",
    "timm.legacy_xception",
    "timm.nasnetalarge",
    "timm.pnasnet5large",
    "timm.pit_ti_224",
    "torchvision.resnet18",
    "torchvision.densenet121",
    "torchvision.mobilenet_v3_small",
    "torchvision.swin_t",
)
# What makes a network of the same kind that is sooner run.
SMALLER: Mapping[str, Mapping[str, Any]] = {
    "detrex.InternImage": {"depths": [1, 1, 1, 1]},
    "detrex.TimmBackbone": {"model_name": "resnet18d"},
    "mmpretrain.ConvMixer": {"arch": {"embed_dims": 32, "depth": 4, "patch_size": 7, "kernel_size": 9}},
}
# Types with one level: nothing can be left out.
SINGLE = frozenset(
    {
        "detectron2.ViT",
        "detrex.EVA02_ViT",
        "detrex.EVAViT",
        "mmdet.HourglassNet",
        "mmpretrain.AlexNet",
        "mmpretrain.HiViT",
        "mmpretrain.InceptionV3",
        "mmpretrain.LeNet5",
        "mmpretrain.MAEHiViT",
        "mmpretrain.MixMIMPretrainTransformer",
        "mmpretrain.MixMIMTransformer",
        "mmpretrain.RevVisionTransformer",
        "mmpretrain.TNT",
        "mmpretrain.iTPNHiViT",
    }
)
# Types whose output norms do not depend on `out_indices`, which count other things than their features.
OTHER_INDICES = frozenset({"mmdet.SSDVGG"})
# The part of the deepest level's cost that the shallowest may take: of any type, and of those that have a reason.
SHARE = 0.5
SHARES: Mapping[str, tuple[float, str]] = {
    "mmdet.HRNet": (0.999, "all branches run side by side to the end, where each sees the others"),
    "mmpretrain.HRNet": (0.999, "all branches run side by side to the end, where each sees the others"),
    "detectron2.FPN": (0.9, "the coarse levels go into the fine ones"),
    "detectron2.build_resnet_fpn_backbone": (0.9, "the coarse levels go into the fine ones"),
    "detectron2.build_retinanet_resnet_fpn_backbone": (0.9, "the coarse levels go into the fine ones"),
    "detectron2.SimpleFeaturePyramid": (
        0.95,
        "all levels are made of the last map, the finest by most layers",
    ),
    "detrex.SimpleFeaturePyramid": (0.95, "all levels are made of the last map, the finest by most layers"),
}
# Pyramids whose finest level, the first, is the last to be computed.
FROM_THE_TOP = frozenset(name for name in SHARES if not name.endswith("HRNet"))


def built(type_name: str) -> tuple[Backbone, Description]:
    """The example of a type with all of its levels, on the meta device."""
    family = backbone_registry().resolve(type_name).family
    raw = {**family.example(type_name), **SMALLER.get(type_name, {}), "type": type_name}
    config = config_of(family.config, raw)
    description = family.describe(config)
    if "out_indices" in family.config.model_fields and type_name not in OTHER_INDICES:
        indices = sorted({feature.index for feature in description.features})
        config = config_of(family.config, {**raw, "out_indices": indices})
    with torch.device("meta"), building.SkipInitialisers():
        network: Backbone = family.build(config)
    return network.eval().requires_grad_(requires_grad=False), description


def config_of(config_class: type[BackboneConfig], raw: Mapping[str, Any]) -> BackboneConfig:
    return config_class.model_validate(raw, context={"scope": raw["type"].partition(".")[0]})


def cost(network: Backbone, description: Description, nodes: Sequence[str]) -> int:
    """Floating-point operations of convolutions, products and attention for one image."""
    images = torch.empty(1, description.in_channels, *(description.input.size or (224, 224)), device="meta")
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        network(images, nodes)
    total: int = counter.get_total_flops()
    return total


def ends(features: Sequence[FeatureInfo], type_name: str) -> tuple[str, str]:
    """The nodes of the level that is computed first, and of that which is computed last."""
    first, last = features[0].node, features[-1].node
    return (last, first) if type_name in FROM_THE_TOP else (first, last)


@pytest.mark.parametrize("type_name", sorted({*(entry[0] for entry in TYPES), *SAMPLED} - SINGLE))
def test_a_shallow_level_does_not_cost_what_the_deepest_does(type_name: str) -> None:
    network, description = built(type_name)
    shallow, deep = ends(description.features, type_name)
    share, _ = SHARES.get(type_name, (SHARE, ""))
    assert cost(network, description, [shallow]) <= share * cost(network, description, [deep])
