"""What can be asked for, as JSON: lists of types, the page of one type, and what a config would build."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from service.backbones.base import Family
from service.backbones.catalogue import backbone_registry
from service.backbones.registry import TypeEntry
from service.config.files import ConfigCatalogue, named_in_errors
from service.config.spec import FreezeReport
from service.errors import InvalidConfig
from service.necks.catalogue import neck_registry
from service.runtime.plan import LevelShape, NeckPlan, Plan, Planner


def list_types(
    planner: Planner, scope: str, search: str, limit: int, cursor: str, address: str
) -> dict[str, Any]:
    """One page of the types, in the order of their names; `next` is the cursor of the page after, or None.

    The page of a type is at `address` followed by its name.
    """
    words = search.lower().split()
    found = [entry for entry in planner.backbones.entries() if _matches(entry, scope, words)]
    page = [entry for entry in found if entry.type > cursor]
    more = page[limit - 1].type if len(page) > limit else None
    return {"types": [_row(entry, address) for entry in page[:limit]], "total": len(found), "next": more}


def _matches(entry: TypeEntry, scope: str, words: list[str]) -> bool:
    scopes = {name.partition(".")[0] for name in (entry.type, *entry.aliases)}
    text = " ".join((entry.type, *entry.aliases, entry.summary)).lower()
    return (not scope or scope in scopes) and all(word in text for word in words)


def _row(entry: TypeEntry, address: str) -> dict[str, Any]:
    row = {
        "type": entry.type,
        "scope": entry.scope,
        "aliases": list(entry.aliases),
        "summary": entry.summary,
        "href": f"{address}{entry.type}",
    }
    return row if entry.unsupported is None else {**row, "unsupported": entry.unsupported}


def type_page(planner: Planner, name: str, address: str) -> dict[str, Any]:
    """Everything about one type, whose page is at `address` followed by its name.

    Raises:
        UnknownBackbone, InvalidConfig: as for `Registry.resolve`.
    """
    resolved = planner.backbones.resolve(name, pointer="#/path/type")
    example = {**resolved.family.example(resolved.type), "type": resolved.type}
    plan = planner.plan(example)
    by_default = _by_default(planner, example, plan)
    return {
        **_row(resolved.entry, address),
        "schema": resolved.family.config.model_json_schema(),
        "architectures": list(resolved.family.architectures(resolved.type)),
        "checkpoint_layouts": list(checkpoint_layouts(resolved.entry, resolved.family)),
        "indices": {
            # Some families have only the features that are asked for.
            "permitted": sorted(
                {feature.index for known in (plan, by_default) for feature in known.description.features}
            ),
            "default": list(dict.fromkeys(level.index for level in by_default.levels)),
        },
        "example": example,
    }


def _by_default(planner: Planner, example: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan of an example without what chooses levels; its own where a type cannot do without."""
    try:
        return planner.plan(_required(example))
    except InvalidConfig:
        return plan


def checkpoint_layouts(entry: TypeEntry, family: Family[Any]) -> tuple[str, ...]:
    """The libraries by whose names a type's checkpoints are read, its own first; the layouts that all types share
    (prefixes, wrappers) are not among them.
    """
    own = family.key_library or entry.scope
    others = family.naming.libraries() if family.naming is not None else ()
    return tuple(dict.fromkeys((own, *others)))


def _required(example: Mapping[str, Any]) -> dict[str, Any]:
    """An example without what chooses levels."""
    choosing = (
        "out_indices",
        "return_nodes",
        "return_layers",
        "strides",
        "out_features",
        "MODEL",  # of yacs; all of it has defaults
    )
    return {key: value for key, value in example.items() if key not in choosing}


def inspection(planner: Planner, plan: Plan, size: tuple[int, int] | None) -> dict[str, Any]:
    """What a config would build, at an input of [height, width]."""
    measured = size or plan.input_size
    return {
        "type": plan.type,
        "input_size": list(measured),
        "levels": [_level(level) for level in planner.levels_at(plan, measured, "#/input_size")],
        "parameters": plan.description.parameters,
        "bytes": plan.description.bytes,
        "neck": None if plan.neck is None else _neck(plan.neck),
        "weights": None
        if plan.weights is None
        else {"checkpoint": plan.weights.name, "prefix": plan.weights.prefix},
        "frozen": _frozen(plan.frozen),
    }


def _level(level: LevelShape) -> dict[str, Any]:
    fact = level.fact
    return {
        "index": fact.index,
        "name": fact.name,
        "layout": fact.layout,
        "stride": fact.stride,
        "channels": fact.channels,
        "shape": list(level.shape),
    }


def _neck(neck: NeckPlan) -> dict[str, Any]:
    described = neck.description
    return {"type": neck.type, "parameters": described.parameters, "bytes": described.bytes}


def _frozen(report: FreezeReport) -> dict[str, Any]:
    return {
        "stages": report.stages,
        "parameters": list(report.parameters),
        "norms": list(report.norms),
        "of": report.of,
    }


def inspect_offline(
    config_dir: str, backbone: Any, neck: Any, size: tuple[int, int] | None
) -> dict[str, Any]:
    """`inspection` without a running service.

    Raises:
        ServiceError: the config is not valid.
    """
    planner = Planner(backbone_registry(), neck_registry(), ConfigCatalogue(Path(config_dir)))
    preprocess = None
    with named_in_errors(backbone if isinstance(backbone, str) else None):
        if isinstance(backbone, str):
            backbone, neck, preprocess = planner.named(backbone, neck, preprocess)
        return inspection(planner, planner.plan(backbone, neck, preprocess), size)
