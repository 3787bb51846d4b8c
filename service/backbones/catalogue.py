"""The table of backbone types: a family is a file and a line here; what cannot be served has its reason."""

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
    ("detectron2.FPN", "detectron2_fpn:FPN_FAMILY", "A feature pyramid around any backbone of detectron2"),
    (
        "detectron2.build_resnet_fpn_backbone",
        "detectron2_fpn:YACS_FPN",
        "detectron2's ResNet with FPN by keys for yacs: MODEL.FPN, a max pool on top",
    ),
    (
        "detectron2.build_retinanet_resnet_fpn_backbone",
        "detectron2_fpn:YACS_FPN",
        "The same with two convolutions on top, as RetinaNet has it",
    ),
    ("detectron2.ViT", "detectron2_vit:VIT", "Plain ViT of detectors: windows, relative positions, one map"),
    (
        "detectron2.SimpleFeaturePyramid",
        "detectron2_simple_pyramid:SIMPLE_PYRAMID",
        "Levels of several scales made of one map, as ViTDet has them",
    ),
    (
        "detrex.SimpleFeaturePyramid",
        "detectron2_simple_pyramid:SIMPLE_PYRAMID",
        "detectron2's simple pyramid, for detrex's EVA",
    ),
    ("detectron2.RegNet", "detectron2_regnet:REGNET", "RegNetX and RegNetY with pycls' key names"),
    (
        "detectron2.SwinTransformer",
        "detectron2_swin:SWIN",
        "Swin Transformer, as detectron2 has it: levels p0 to p3",
    ),
    ("detectron2.MViT", "detectron2_mvit:MVIT", "MViTv2: attention over pooled maps, four scales"),
    ("detectron2.ResNet", "detectron2_configs:RESNET", "ResNet and ResNeXt with FrozenBN, freeze_at and DC5"),
    ("detrex.ResNet", "detectron2_configs:RESNET", "detectron2's ResNet, made for DETRs"),
    ("detrex.ConvNeXt", "detrex_convnext:DETREX_CONVNEXT", "ConvNeXt, as detrex has it: levels p0 to p3"),
    ("detrex.EVAViT", "eva:EVA_FAMILY", "EVA as a detector's backbone: attention in windows, one map"),
    ("detrex.EVA02_ViT", "eva02:EVA02_FAMILY", "EVA-02: rotated queries and keys, one map"),
    ("detrex.FocalNet", "focalnet:FOCALNET", "Focal modulation networks: levels p0 to p3"),
    ("detrex.InternImage", "internimage:INTERNIMAGE", "Deformable convolutions, DCNv3: levels p0 to p3"),
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
    (
        "mmpretrain.Conformer",
        "conformer:CONFORMER",
        "A residual network beside a transformer: two vectors a block",
    ),
    ("mmpretrain.DaViT", "davit:DAVIT", "Attention in windows and among channels, tiny to giant"),
    ("mmpretrain.EdgeNeXt", "edgenext:EDGENEXT", "ConvNeXt with attention among channels, for small devices"),
    (
        "mmpretrain.EfficientFormer",
        "efficientformer:EFFICIENTFORMER",
        "Pooling on maps, then attention on tokens",
    ),
    ("mmpretrain.HiViT", "hivit:HIVIT", "Patches that shrink to tokens, then a transformer"),
    ("mmpretrain.HorNet", "hornet:HORNET", "Gates upon gates from large neighbourhoods"),
    ("mmpretrain.InceptionV3", "inception:INCEPTION_V3", "Inception v3 with its classifier"),
    ("mmpretrain.LeViT", "levit:LEVIT", "Attention with biases of distance, for images of one size"),
    ("mmpretrain.MViT", "mvit:MVIT", "Multi-scale vision transformer v2: attention that pools"),
    ("mmpretrain.LeNet5", "alexnet:LENET5", "LeNet-5 for grey images of 32 pixels"),
    ("mmpretrain.MixMIMTransformer", "mixmim:MIXMIM", "Windows that are not shifted, for mixed images"),
    ("mmpretrain.MlpMixer", "mlp_mixer:MLP_MIXER", "Linear layers over patches, then over channels"),
    ("mmpretrain.MobileOne", "mobileone:MOBILEONE", "MobileOne as trained and as deployed"),
    ("mmpretrain.MobileViT", "mobilevit:MOBILEVIT", "Inverted residuals and attention among patches"),
    ("mmpretrain.RIFormer", "riformer:RIFORMER", "PoolFormer without its pooling"),
    ("mmpretrain.PCPVT", "twins:PCPVT", "Twins-PCPVT: attention to smaller maps"),
    ("mmpretrain.RepLKNet", "replknet:REPLKNET", "Depthwise convolutions of up to 31x31"),
    ("mmpretrain.RepMLPNet", "repmlp:REPMLPNET", "Linear layers over all positions of a map"),
    ("mmpretrain.SVT", "twins:SVT", "Twins-SVT: attention in windows and to smaller maps in turn"),
    ("mmpretrain.ShuffleNetV1", "shufflenet:SHUFFLENET_V1", "Grouped 1x1 convolutions and shuffled channels"),
    ("mmpretrain.ShuffleNetV2", "shufflenet:SHUFFLENET_V2", "Half of the channels pass, half are filtered"),
    ("mmpretrain.SwinTransformerV2", "swin_v2:SWIN_TRANSFORMER_V2", "Swin Transformer V2, tiny to giant"),
    (
        "mmpretrain.TinyViT",
        "tinyvit:TINYVIT",
        "Inverted residuals, then attention in windows, for small models",
    ),
    ("mmpretrain.XCiT", "xcit:XCIT", "Transformers with attention among channels"),
    ("mmpretrain.TNT", "tnt:TNT_FAMILY", "Transformers among the pixels of patches and among patches"),
    ("mmpretrain.T2T_ViT", "t2t_vit:T2T_VIT", "T2T-ViT: patches that overlap become tokens"),
    ("mmpretrain.ViTEVA02", "vit_eva02:VIT_EVA02", "EVA-02: rotated queries and keys"),
    ("mmpretrain.ViTSAM", "vit_sam:VIT_SAM", "The image encoder of Segment Anything"),
    ("mmdet.PyramidVisionTransformer", "pvt:PYRAMID_VISION_TRANSFORMER", "PVT: transformers at four scales"),
    ("mmdet.PyramidVisionTransformerV2", "pvt:PYRAMID_VISION_TRANSFORMER_V2", "PVT v2: patches that overlap"),
    (
        "mmpretrain.RevVisionTransformer",
        "rev_vit:REV_VISION_TRANSFORMER",
        "Vision Transformer of two reversible streams",
    ),
    ("mmdet.SSDVGG", "ssd_vgg:SSD_VGG", "VGG as the single-shot detector takes it"),
    (
        "mmdet.DetectoRS_ResNet",
        "detectors_resnet:DETECTORS_RESNET",
        "DetectoRS's ResNet, standardised weights included",
    ),
    (
        "mmdet.DetectoRS_ResNeXt",
        "detectors_resnet:DETECTORS_RESNEXT",
        "DetectoRS's ResNeXt, standardised weights included",
    ),
    ("mmdet.TridentResNet", "detectors_resnet:TRIDENT_RESNET", "TridentNet's ResNet: one of its branches"),
    ("mmpretrain.MAEViT", "pretraining:MAE_VIT", "MAE's encoder, without masking"),
    ("mmpretrain.MILANViT", "pretraining:MAE_VIT", "MILAN's encoder, without masking"),
    ("mmpretrain.MaskFeatViT", "pretraining:MASKFEAT_VIT", "MaskFeat's encoder, without masking"),
    ("mmpretrain.MoCoV3ViT", "pretraining:MOCO_V3_VIT", "MoCo v3's Vision Transformer"),
    ("mmselfsup.MoCoV3ViT", "pretraining:MMSELFSUP_MOCO_V3_VIT", "MoCo v3's, as mmselfsup has it"),
    ("mmpretrain.BEiTPretrainViT", "pretraining:BEIT_PRETRAIN_VIT", "BEiT's encoder, without masking"),
    ("mmpretrain.CAEPretrainViT", "pretraining:CAE_PRETRAIN_VIT", "CAE's encoder, without masking"),
    ("mmpretrain.SimMIMSwinTransformer", "pretraining:SIMMIM_SWIN", "SimMIM's Swin, without masking"),
    ("mmpretrain.MAEHiViT", "pretraining:MAE_HIVIT", "MAE's HiViT, without masking"),
    ("mmpretrain.iTPNHiViT", "pretraining:ITPN_HIVIT", "iTPN's HiViT, without masking"),
    ("mmpretrain.MixMIMPretrainTransformer", "pretraining:MIXMIM_PRETRAIN", "MixMIM's, without masking"),
    (
        "mmpretrain.VisionTransformer",
        "vision_transformer:VISION_TRANSFORMER",
        "Vision Transformer, DeiT, MAE, DINOv2",
    ),
)
_MASKED = "it masks its images on every pass; {} takes the same weights and all of the image"
_SPARSE = "its convolutions need a mask of the images; its weights load into {}, as fine-tuning takes them"
_GRAPH = (
    "it chooses neighbours by distance, and rounding changes the choice: the same request would not give the "
    "same numbers"
)
_PROJECT = "it belongs to a project beside {}, not to the library"
# type, summary, why it is not served
UNSUPPORTED = (
    (
        "mmpretrain.LoRAModel",
        "A model with low-rank adaptations",
        "merge the adaptations into its backbone's weights",
    ),
    (
        "mmpretrain.MFFViT",
        "MFF's encoder",
        "it masks its images at random on every pass, asked to or not; its encoder is mmpretrain.MAEViT",
    ),
    ("mmpretrain.PyramidVig", "Graphs of patches at four scales", _GRAPH),
    ("mmpretrain.SparseConvNeXt", "SparK's ConvNeXt", _SPARSE.format("mmpretrain.ConvNeXt")),
    ("mmpretrain.SparseResNet", "SparK's ResNet", _SPARSE.format("mmpretrain.ResNet")),
    ("mmpretrain.Vig", "Graphs of patches", _GRAPH),
    ("mmselfsup.BEiTViT", "BEiT's encoder", _MASKED.format("mmpretrain.BEiTPretrainViT")),
    (
        "mmselfsup.CAEViT",
        "CAE's encoder",
        "it takes the patches that a mask leaves, and has no pass without one",
    ),
    ("mmselfsup.MAEViT", "MAE's encoder", _MASKED.format("mmpretrain.MAEViT")),
    ("mmselfsup.MILANViT", "MILAN's encoder", _MASKED.format("mmpretrain.MILANViT")),
    ("mmselfsup.MaskFeatViT", "MaskFeat's encoder", _MASKED.format("mmpretrain.MaskFeatViT")),
    (
        "mmselfsup.MixMIMTransformerPretrain",
        "MixMIM's encoder",
        _MASKED.format("mmpretrain.MixMIMPretrainTransformer"),
    ),
    ("mmselfsup.SimMIMSwinTransformer", "SimMIM's Swin", _MASKED.format("mmpretrain.SimMIMSwinTransformer")),
    ("mmyolo.BaseBackbone", "What mmyolo's backbones begin with", "it has no layers of its own"),
    ("detectron2.build_hrfpn_backbone", "DensePose's HRNet with a pyramid", _PROJECT.format("detectron2")),
    ("detectron2.build_pose_hrnet_backbone", "DensePose's HRNet", _PROJECT.format("detectron2")),
    ("detectron2.build_resnet_deeplab_backbone", "DeepLab's ResNet", _PROJECT.format("detectron2")),
    ("detectron2.build_trident_resnet_backbone", "TridentNet's ResNet", _PROJECT.format("detectron2")),
    ("detrex.D2FocalNet", "MaskDINO's FocalNet", _PROJECT.format("detrex")),
    ("detrex.D2SwinTransformer", "MaskDINO's Swin Transformer", _PROJECT.format("detrex")),
)
# OpenMMLab renamed mmcls to mmpretrain at 1.0
FORMER_SCOPES = {"mmpretrain": ("mmcls",)}
FORMER_NAMES = {"mmpretrain.BEiTViT": ("mmcls.BEiT",)}


def entries() -> Iterator[TypeEntry]:
    """Every shipped type."""
    for type_name, family, summary in TYPES:
        yield TypeEntry(type_name, f"service.backbones.{family}", summary, former_names(type_name))
    for type_name, summary, reason in UNSUPPORTED:
        yield TypeEntry(type_name, "", summary, former_names(type_name), reason)
    for name, timm in timm_models().items():
        yield TypeEntry(
            f"timm.{name}",
            "service.backbones.timm:TIMM",
            timm.summary,
            unsupported=timm.unsupported,
            takes_tag=True,
        )
    for name, torchvision in torchvision_models().items():
        yield TypeEntry(
            f"torchvision.{name}", "service.backbones.torchvision:TORCHVISION", torchvision.summary
        )


def former_names(type_name: str) -> tuple[str, ...]:
    """What a type was called when its scope or itself had another name."""
    scope, _, name = type_name.partition(".")
    scopes = FORMER_SCOPES.get(scope, ())
    return tuple(f"{former}.{name}" for former in scopes) + FORMER_NAMES.get(type_name, ())


def backbone_registry() -> Registry[Family[Any]]:
    """The registry of backbones, third parties' included."""
    renamed = {f"timm.{old}": f"timm.{new}" for old, new in timm_renamed().items()}
    return Registry(entries(), Family, ENTRY_POINT_GROUP, renamed=renamed)
