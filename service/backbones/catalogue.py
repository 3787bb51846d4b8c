"""The table of backbone types that are served: a family is a file and a line here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from service.backbones.base import Family
from service.backbones.registry import ENTRY_POINT_GROUP, Registry, TypeEntry
from service.backbones.tables import timm_models, timm_renamed, torchvision_models

# type, family, summary
TYPES = (
    ("mmpretrain.ResNet", "resnet:RESNET", "Residual networks of depth 18 to 152"),
    ("mmpretrain.TIMMBackbone", "timm:TIMM_BACKBONE", "Any timm model, as OpenMMLab wraps it"),
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
