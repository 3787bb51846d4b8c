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
    ("mmdet.YOLOXPAFPN", "yolo:DETECTION_YOLOX", "YOLOX's neck by mmdet's key names"),
    ("mmdet.CSPNeXtPAFPN", "yolo:DETECTION_CSPNEXT", "RTMDet's neck by mmdet's key names"),
    ("mmyolo.YOLOv5PAFPN", "yolo:YOLOV5", "YOLOv5's neck"),
    ("mmyolo.YOLOv8PAFPN", "yolo:YOLOV8", "YOLOv8's neck"),
    ("mmyolo.YOLOXPAFPN", "yolo:YOLOX", "YOLOX's neck"),
    ("mmyolo.CSPNeXtPAFPN", "yolo:CSPNEXT", "RTMDet's neck"),
    ("mmyolo.YOLOv6RepPAFPN", "yolov6:REP_PAFPN", "YOLOv6's neck of branched convolutions"),
    ("mmyolo.YOLOv6CSPRepPAFPN", "yolov6:CSP_REP_PAFPN", "YOLOv6's neck of cross-stage partial layers"),
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
)


def entries() -> Iterator[TypeEntry]:
    """Every shipped type."""
    for type_name, family, summary in TYPES:
        yield TypeEntry(type_name, f"service.necks.{family}", summary, former_names(type_name))


def neck_registry() -> Registry[NeckFamily[Any]]:
    """The registry of necks, third parties' included."""
    return Registry(entries(), NeckFamily, ENTRY_POINT_GROUP, "neck type")
