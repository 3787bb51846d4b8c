"""The configs of the public tutorials are shipped by name, and are the networks and levels of a parity pack."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.backbones.catalogue import backbone_registry
from service.config.files import ConfigCatalogue
from service.necks.catalogue import neck_registry
from service.runtime.plan import Plan, Planner
from tests.parity.packs import load_pack

PLANNER = Planner(
    backbone_registry(),
    neck_registry(),
    ConfigCatalogue(Path(__file__).parents[2] / "model_configs"),
)
SEEDS = {
    "resnet50": "openmmlab/mmpretrain-ResNet-50-64px",
    "mmpretrain/vit_base_p16": "openmmlab/mmcls0.25-VisionTransformer-base-p16-noclstok-nofinalnorm",
    "mmpretrain/cspresnext50": "openmmlab/mmpretrain-CSPResNeXt-50",
    "mmpretrain/regnetx_4.0gf": "openmmlab/mmpretrain-RegNet-regnetx_4.0gf",
    "mmpretrain/mobilenet_v3_small": "openmmlab/mmcls0.25-MobileNetV3-small",
    "mmpretrain/convnext_tiny": "openmmlab/mmcls0.25-ConvNeXt-tiny",
    "mmpretrain/resnet18_cifar": "openmmlab/mmpretrain-ResNet_CIFAR-18",
    "mmpretrain/timm_efficientnet_b1": "openmmlab/mmcls1rc6-TIMMBackbone-efficientnet_b1-234",
    "mmdet/resnet50": "openmmlab/mmdet-ResNet-50-pytorch",
    "mmdet/resnet50_caffe": "openmmlab/mmdet-ResNet-50-bnfrozen",
    "mmdet/swin_tiny": "openmmlab/mmdet-SwinTransformer-tiny",
    "mmselfsup/resnet50": "openmmlab/mmselfsup-ResNet-50",
    "mmyolo/yolov6_s": "openmmlab/mmyolo-YOLOv6EfficientRep-s",
    "detrex/resnet50": "detectron2/d2_resnet50_odd_size",
    "detrex/resnet50_dc5": "detectron2/detrex_resnet50_dc5",
    "detrex/timm_resnet152d": "detectron2/detrex_timm_resnet152d",
    "detrex/torchvision_resnet50": "detectron2/detrex_torchvision_resnet50",
}


def plan_of(name: str) -> Plan:
    return PLANNER.plan(*PLANNER.named(name, None, None))


@pytest.mark.parametrize(("name", "pack"), SEEDS.items())
def test_a_named_config_is_the_network_of_a_pack_with_its_levels(name: str, pack: str) -> None:
    shipped, library = plan_of(name), PLANNER.plan(load_pack(pack).config)
    assert shipped.config.key() == library.config.key()
    assert [level.node for level in shipped.levels] == [level.node for level in library.levels]


def test_a_name_that_timm_has_changed_is_the_network_of_the_new_one() -> None:
    old = plan_of("mmpretrain/timm_tf_efficientnetv2_s_in21k")
    new = PLANNER.plan({"type": "timm.tf_efficientnetv2_s.in21k", "out_indices": [2, 3, 4]})
    assert old.config.key() == new.config.key()
    assert [level.channels for level in old.description.features if level.index in (2, 3, 4)] == [
        64,
        160,
        256,
    ]
