"""The table of neck types that are served: a family is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.backbones.catalogue import former_names
from service.backbones.registry import Registry, TypeEntry
from service.necks.base import NeckFamily

ENTRY_POINT_GROUP = "backbone_service.necks"
# type, family, summary
TYPES = (
    ("mmdet.FPN", "fpn:FPN_FAMILY", "Feature pyramid, top down"),
    ("mmdet.PAFPN", "fpn:PAFPN_FAMILY", "Feature pyramid, top down and back up"),
    ("mmdet.ChannelMapper", "mappers:CHANNEL_MAPPER", "Each level at one width, as DETRs take it"),
    ("mmdet.HRFPN", "mappers:HRFPN_FAMILY", "Pyramid of HRNet's levels"),
    ("mmdet.YOLOV3Neck", "mappers:YOLOV3_NECK", "YOLOv3's neck, the deepest level first"),
    ("mmdet.FPN_DropBlock", "fpn:FPN_DROP_BLOCK", "Feature pyramid, in training with dropped blocks"),
    ("mmdet.NASFPN", "nas_fpn:NAS_FPN", "Feature pyramid of searched merges"),
    ("mmdet.NASFCOS_FPN", "nas_fcos_fpn:NAS_FCOS_FPN", "Feature pyramid of other searched merges"),
    ("mmdet.FPN_CARAFE", "carafe:FPN_CARAFE", "Feature pyramid enlarged by content"),
    ("mmdet.FPG", "fpg:FPG_FAMILY", "Feature pyramids behind each other, as a grid"),
    ("mmdet.DyHead", "dyhead:DY_HEAD", "Attention over levels, places and channels, behind a pyramid"),
    ("mmdet.BFP", "bfp:BFP_FAMILY", "Libra R-CNN's balanced levels, behind a pyramid"),
    ("mmdet.SSDNeck", "single_stage:SSD_NECK", "SSD's extra levels"),
    ("mmdet.SSH", "single_stage:SSH_FAMILY", "SSH's modules of three views, one a level"),
    ("mmdet.DilatedEncoder", "single_stage:DILATED_ENCODER", "YOLOF's encoder of one level"),
    ("mmdet.CTResNetNeck", "single_stage:CT_RESNET_NECK", "CenterNet's enlarging steps"),
    ("mmdet.GlobalAveragePooling", "global_average_pooling:WINDOW_POOLING", "Each map to means of windows"),
    ("mmdet.YOLOXPAFPN", "yolo:DETECTION_YOLOX", "YOLOX's neck by mmdet's key names"),
    ("mmdet.CSPNeXtPAFPN", "yolo:DETECTION_CSPNEXT", "RTMDet's neck by mmdet's key names"),
    ("mmyolo.YOLOv5PAFPN", "yolo:YOLOV5", "YOLOv5's neck"),
    ("mmyolo.YOLOv8PAFPN", "yolo:YOLOV8", "YOLOv8's neck"),
    ("mmyolo.YOLOXPAFPN", "yolo:YOLOX", "YOLOX's neck"),
    ("mmyolo.CSPNeXtPAFPN", "yolo:CSPNEXT", "RTMDet's neck"),
    ("mmyolo.YOLOv6RepPAFPN", "yolov6:REP_PAFPN", "YOLOv6's neck of branched convolutions"),
    ("mmyolo.YOLOv6CSPRepPAFPN", "yolov6:CSP_REP_PAFPN", "YOLOv6's neck of cross-stage partial layers"),
    ("mmyolo.YOLOv6RepBiPAFPN", "yolov6:REP_BI_PAFPN", "YOLOv6 3.0's neck of branched convolutions"),
    ("mmyolo.YOLOv6CSPRepBiPAFPN", "yolov6:CSP_REP_BI_PAFPN", "YOLOv6 3.0's neck of partial layers"),
    ("mmyolo.YOLOv7PAFPN", "yolov7:YOLOV7", "YOLOv7's neck"),
    ("mmyolo.PPYOLOECSPPAFPN", "ppyoloe:PPYOLOE", "PP-YOLOE's neck"),
    ("mmpretrain.GeneralizedMeanPooling", "classifiers:GEM", "Each map to its generalised mean"),
    ("mmpretrain.LinearNeck", "classifiers:LINEAR", "The last level through a linear layer"),
    ("mmpretrain.HRFuseScales", "classifiers:HR_FUSE", "HRNet's four levels made one"),
    (
        "mmpretrain.GlobalAveragePooling",
        "global_average_pooling:GLOBAL_AVERAGE_POOLING",
        "Each map to its mean",
    ),
    ("mmpretrain.NonLinearNeck", "projections:NON_LINEAR", "A level through linear layers and norms"),
    ("mmpretrain.MoCoV2Neck", "projections:MOCO_V2", "A level through MoCo v2's projection"),
    ("mmpretrain.DenseCLNeck", "projections:DENSE_CL", "A map and its pixels through DenseCL's projections"),
    ("mmpretrain.SwAVNeck", "projections:SWAV", "A map through SwAV's projection"),
    ("mmpretrain.ClsBatchNormNeck", "projections:CLS_BATCH_NORM", "A batch norm of vectors"),
    ("mmselfsup.NonLinearNeck", "projections:SELFSUP_NON_LINEAR", "A level through linear layers and norms"),
    ("mmselfsup.MoCoV2Neck", "projections:MOCO_V2", "A level through MoCo v2's projection"),
    ("mmselfsup.DenseCLNeck", "projections:DENSE_CL", "A map and its pixels through DenseCL's projections"),
    ("mmselfsup.SwAVNeck", "projections:SELFSUP_SWAV", "A map through SwAV's projection"),
    ("mmselfsup.ClsBatchNormNeck", "projections:SELFSUP_CLS_BATCH_NORM", "A batch norm of class tokens"),
    ("mmselfsup.LinearNeck", "projections:SELFSUP_LINEAR", "A level through a linear layer"),
    ("mmselfsup.AvgPool2dNeck", "projections:AVG_POOL_2D", "A map averaged to a size"),
    ("mmselfsup.ODCNeck", "projections:ODC", "A level through ODC's projection"),
    ("mmselfsup.RelativeLocNeck", "projections:RELATIVE_LOC", "Two crops' channels through one projection"),
)

WHOLE = "it restores masked patches in pre-training, and its parts need the mask"
# type, why it is known and not served
UNSUPPORTED = (
    ("mmdet.RFP", "it runs a second backbone inside of the neck"),
    ("mmpretrain.BEiTV2Neck", WHOLE),
    ("mmpretrain.CAENeck", WHOLE),
    ("mmpretrain.iTPNPretrainDecoder", WHOLE),
    ("mmpretrain.MAEPretrainDecoder", WHOLE),
    ("mmpretrain.MILANPretrainDecoder", WHOLE),
    ("mmpretrain.MixMIMPretrainDecoder", WHOLE),
    ("mmpretrain.SimMIMLinearDecoder", WHOLE),
    ("mmpretrain.SparKLightDecoder", WHOLE),
    ("mmselfsup.BEiTV2Neck", WHOLE),
    ("mmselfsup.CAENeck", WHOLE),
    ("mmselfsup.MAEPretrainDecoder", WHOLE),
    ("mmselfsup.MILANPretrainDecoder", WHOLE),
    ("mmselfsup.MixMIMPretrainDecoder", WHOLE),
    ("mmselfsup.SimMIMNeck", WHOLE),
    ("mmyolo.BaseYOLONeck", "it is what mmyolo's necks are derived from, and no network by itself"),
)


def entries() -> Iterator[TypeEntry]:
    """Every shipped type."""
    for type_name, family, summary in TYPES:
        yield TypeEntry(type_name, f"service.necks.{family}", summary, former_names(type_name))
    for type_name, reason in UNSUPPORTED:
        yield TypeEntry(type_name, "", "not served", former_names(type_name), unsupported=reason)


def neck_registry() -> Registry[NeckFamily[Any]]:
    """The registry of necks, third parties' included."""
    return Registry(entries(), NeckFamily, ENTRY_POINT_GROUP, "neck type")
