"""The table of backbone types that are served: a family is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.backbones.base import Family
from service.backbones.registry import ENTRY_POINT_GROUP, Registry, TypeEntry
from service.backbones.tables import timm_models, timm_renamed, torchvision_models

# type, family, summary
TYPES = (
    ("mmdet.CSPDarknet", "csp_darknet:CSP_DARKNET", "YOLOX's CSPDarknet, as mmdet has it"),
    ("mmdet.CSPNeXt", "cspnext:MMDET", "RTMDet's CSPNeXt, as mmdet has it"),
    ("mmdet.Darknet", "darknet:DARKNET", "YOLOv3's Darknet-53"),
    ("mmdet.HourglassNet", "hourglass:HOURGLASS", "Hourglasses behind each other, for CornerNet"),
    ("mmyolo.CSPNeXt", "cspnext:MMYOLO", "RTMDet's CSPNeXt, as mmyolo has it"),
    ("mmyolo.PPYOLOECSPResNet", "ppyoloe:PPYOLOE", "PP-YOLOE's ResNet with cross-stage partial connections"),
    ("mmyolo.YOLOXCSPDarknet", "csp_darknet:YOLOX", "YOLOX's CSPDarknet, as mmyolo has it"),
    ("mmyolo.YOLOv5CSPDarknet", "csp_darknet:YOLOV5", "YOLOv5's CSPDarknet"),
    ("mmyolo.YOLOv6CSPBep", "yolov6:CSP_BEP", "YOLOv6's larger backbones, as trained"),
    ("mmyolo.YOLOv6EfficientRep", "yolov6:EFFICIENT_REP", "YOLOv6's smaller backbones, as trained"),
    ("mmyolo.YOLOv7Backbone", "yolov7:YOLOV7", "YOLOv7's backbones, Tiny to E2E"),
    ("mmyolo.YOLOv8CSPDarknet", "csp_darknet:YOLOV8", "YOLOv8's CSPDarknet"),
    ("mmpretrain.SwinTransformer", "swin:SWIN_TRANSFORMER", "Swin Transformer, tiny to large"),
    ("mmdet.SwinTransformer", "swin:DET_SWIN_TRANSFORMER", "Swin Transformer, as detectors take it"),
    ("mmpretrain.ConvNeXt", "convnext:CONVNEXT", "ConvNeXt and ConvNeXt V2, atto to huge"),
    ("mmpretrain.CSPDarkNet", "csp:CSP_DARKNET", "Darknet with cross-stage partial connections"),
    ("mmpretrain.CSPResNet", "csp:CSP_RESNET", "ResNet with cross-stage partial connections"),
    ("mmpretrain.CSPResNeXt", "csp:CSP_RESNEXT", "ResNeXt with cross-stage partial connections"),
    ("mmpretrain.MobileNetV2", "mobilenet_v2:MOBILENET_V2", "MobileNetV2 of any width"),
    ("mmdet.MobileNetV2", "mobilenet_v2:DET_MOBILENET_V2", "MobileNetV2 of any width, as detectors take it"),
    ("mmpretrain.MobileNetV3", "mobilenet_v3:MOBILENET_V3", "MobileNetV3 small and large"),
    ("mmpretrain.EfficientNetV2", "efficientnet_v2:EFFICIENTNET_V2", "EfficientNetV2 s to xl, b0 to b3"),
    ("mmpretrain.VGG", "vgg:VGG_FAMILY", "VGG 11 to 19, with or without batch norm"),
    ("mmpretrain.DenseNet", "densenet:DENSENET", "Networks whose layers see all layers before"),
    ("mmpretrain.RepVGG", "repvgg:REPVGG", "RepVGG as trained and as deployed"),
    ("mmpretrain.HRNet", "hrnet:HRNET", "High-resolution networks: branches at strides 4 to 32"),
    ("mmdet.HRNet", "hrnet:DET_HRNET", "High-resolution networks, as detectors take them"),
    ("mmpretrain.PoolFormer", "poolformer:POOLFORMER", "Transformers that pool instead of attending"),
    ("mmpretrain.VAN", "van:VAN_FAMILY", "Visual attention networks: gates from large kernels"),
    ("mmpretrain.EfficientNet", "efficientnet:EFFICIENTNET", "EfficientNet b0 to b8, l2, EdgeTPU es, em, el"),
    ("mmdet.EfficientNet", "efficientnet:DET_EFFICIENTNET", "EfficientNet, as detectors take it"),
    ("mmpretrain.ResNet", "resnet:RESNET", "Residual networks of depth 18 to 152"),
    ("mmpretrain.RegNet", "regnet:REGNET", "Residual networks of linear, quantised widths"),
    ("mmpretrain.Res2Net", "res2net:RES2NET", "Residual networks that convolve slices of their channels"),
    ("mmpretrain.ResNeSt", "resnest:RESNEST", "Residual networks with split attention"),
    ("mmpretrain.ResNeXt", "resnet_variants:RESNEXT", "Residual networks with grouped convolutions"),
    ("mmpretrain.ResNetV1c", "resnet_variants:RESNET_V1C", "ResNet with a deep stem"),
    ("mmpretrain.ResNetV1d", "resnet_variants:RESNET_V1D", "ResNet with a deep stem and pooling shortcuts"),
    ("mmpretrain.ResNet_CIFAR", "resnet_variants:RESNET_CIFAR", "ResNet for images of 32 pixels"),
    ("mmpretrain.SEResNeXt", "resnet_variants:SE_RESNEXT", "ResNeXt with squeeze-and-excitation"),
    ("mmpretrain.SEResNet", "resnet_variants:SE_RESNET", "ResNet with squeeze-and-excitation"),
    ("mmdet.RegNet", "regnet:MMDET_REGNET", "RegNet as mmdet's detectors use it"),
    ("mmdet.Res2Net", "res2net:MMDET_RES2NET", "Res2Net as mmdet's detectors use it"),
    ("mmdet.ResNeSt", "resnest:MMDET_RESNEST", "ResNeSt as mmdet's detectors use it"),
    ("mmdet.ResNeXt", "resnet_variants:MMDET_RESNEXT", "ResNeXt as mmdet's detectors use it"),
    ("mmdet.ResNet", "resnet_variants:MMDET_RESNET", "ResNet as mmdet's detectors use it"),
    ("mmdet.ResNetV1d", "resnet_variants:MMDET_RESNET_V1D", "ResNetV1d as mmdet's detectors use it"),
    ("mmselfsup.ResNeXt", "resnet_variants:MMSELFSUP_RESNEXT", "ResNeXt whose level 0 is the stem"),
    ("mmselfsup.ResNet", "resnet_variants:MMSELFSUP_RESNET", "ResNet whose level 0 is the stem"),
    (
        "mmselfsup.ResNetSobel",
        "resnet_variants:MMSELFSUP_RESNET_SOBEL",
        "ResNet over the edges of its images",
    ),
    ("mmselfsup.ResNetV1d", "resnet_variants:MMSELFSUP_RESNET_V1D", "ResNetV1d whose level 0 is the stem"),
    (
        "detectron2.build_resnet_backbone",
        "detectron2_configs:YACS_RESNET",
        "detectron2's ResNet by keys for yacs: MODEL.RESNETS, MODEL.BACKBONE.FREEZE_AT",
    ),
    ("detectron2.ResNet", "detectron2_configs:RESNET", "ResNet and ResNeXt with FrozenBN, freeze_at and DC5"),
    ("detrex.ResNet", "detectron2_configs:RESNET", "detectron2's ResNet, made for DETRs"),
    (
        "detrex.TimmBackbone",
        "detrex_timm:DETREX_TIMM",
        "Any timm model, as detrex wraps it: levels p0, p1, …",
    ),
    (
        "detrex.TorchvisionBackbone",
        "detrex_torchvision:TORCHVISION_BACKBONE",
        "Any torchvision classifier by graph nodes, as detrex wraps it",
    ),
    (
        "detrex.TorchvisionResNet",
        "detrex_torchvision:TORCHVISION_RESNET",
        "torchvision's ResNet with constant batch norms, as DETR has it",
    ),
    ("mmpretrain.TIMMBackbone", "timm:TIMM_BACKBONE", "Any timm model, as OpenMMLab wraps it"),
    ("mmpretrain.AlexNet", "alexnet:ALEXNET", "AlexNet, with or without its classifier"),
    ("mmpretrain.BEiTViT", "beit:BEIT", "BEiT and BEiT v2: biases of relative position"),
    ("mmpretrain.ConvMixer", "convmixer:CONVMIXER", "Patches mixed by depthwise and pointwise convolutions"),
    ("mmpretrain.DeiT3", "deit3:DEIT3", "DeiT III, as mmpretrain computes it"),
    (
        "mmpretrain.DistilledVisionTransformer",
        "deit:DISTILLED_VISION_TRANSFORMER",
        "DeiT with a distillation token",
    ),
    ("mmpretrain.LeNet5", "alexnet:LENET5", "LeNet-5 for grey images of 32 pixels"),
    ("mmpretrain.MobileViT", "mobilevit:MOBILEVIT", "Inverted residuals and attention among patches"),
    ("mmpretrain.RIFormer", "riformer:RIFORMER", "PoolFormer without its pooling"),
    ("mmpretrain.SwinTransformerV2", "swin_v2:SWIN_TRANSFORMER_V2", "Swin Transformer V2, tiny to giant"),
    (
        "mmpretrain.VisionTransformer",
        "vision_transformer:VISION_TRANSFORMER",
        "Vision Transformer, DeiT, MAE, DINOv2",
    ),
)
# OpenMMLab renamed mmcls to mmpretrain at 1.0
FORMER_SCOPES = {"mmpretrain": ("mmcls",)}


def entries() -> Iterator[TypeEntry]:
    """Every shipped type."""
    for type_name, family, summary in TYPES:
        yield TypeEntry(type_name, f"service.backbones.{family}", summary, former_names(type_name))
    for name, timm in timm_models().items():
        reason = timm.unsupported
        yield TypeEntry(
            f"timm.{name}", "service.backbones.timm:TIMM", timm.summary, (), reason, takes_tag=True
        )
    for name, torchvision in torchvision_models().items():
        yield TypeEntry(
            f"torchvision.{name}", "service.backbones.torchvision:TORCHVISION", torchvision.summary
        )


def former_names(type_name: str) -> tuple[str, ...]:
    """What a type was called when its scope had another name."""
    scope, _, name = type_name.partition(".")
    return tuple(f"{former}.{name}" for former in FORMER_SCOPES.get(scope, ()))


def backbone_registry() -> Registry[Family[Any]]:
    """The registry of backbones, third parties' included."""
    renamed = {f"timm.{old}": f"timm.{new}" for old, new in timm_renamed().items()}
    return Registry(entries(), Family, ENTRY_POINT_GROUP, renamed=renamed)
