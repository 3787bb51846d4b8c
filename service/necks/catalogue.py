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
