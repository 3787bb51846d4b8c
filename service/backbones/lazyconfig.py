"""LazyConfig and yacs, as detectron2 and detrex write them, read as data.

`_target_` names a class by any of the paths that it can be imported from; here that is a row of a closed table, and
nothing is imported. What a target becomes is a `type` of this service, or of a part inside a config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rapidfuzz import process

from service.errors import InvalidConfig, UnknownBackbone

TARGET = "_target_"
POINTER = "#/backbone"
MAX_NAME_LENGTH = 128
YACS_KEY = "MODEL"
YACS_BUILDER = "detectron2.build_resnet_backbone"
YACS_SCOPE = "detectron2."
# Which builders the options are for, by the name without its scope.
YACS_BUILDERS = {
    builder.removeprefix(YACS_SCOPE): builder
    for builder in (
        YACS_BUILDER,
        "detectron2.build_resnet_fpn_backbone",
        "detectron2.build_retinanet_resnet_fpn_backbone",
    )
}
# Backbones inside a backbone, and what else is an object there.
NESTED_KEYS = ("bottom_up", "net")
PART_KEYS = ("stem", "stages", "top_block")
MAX_NESTING = 8

# The file below `modeling/backbone/`, what it defines that is a backbone, and its type.
BACKBONES = (
    ("detectron2", "resnet", "ResNet", "detectron2.ResNet"),
    ("detectron2", "resnet", "build_resnet_backbone", YACS_BUILDER),
    ("detectron2", "fpn", "FPN", "detectron2.FPN"),
    ("detectron2", "fpn", "build_resnet_fpn_backbone", YACS_BUILDERS["build_resnet_fpn_backbone"]),
    (
        "detectron2",
        "fpn",
        "build_retinanet_resnet_fpn_backbone",
        YACS_BUILDERS["build_retinanet_resnet_fpn_backbone"],
    ),
    ("detectron2", "vit", "ViT", "detectron2.ViT"),
    ("detectron2", "vit", "SimpleFeaturePyramid", "detectron2.SimpleFeaturePyramid"),
    ("detectron2", "regnet", "RegNet", "detectron2.RegNet"),
    ("detectron2", "swin", "SwinTransformer", "detectron2.SwinTransformer"),
    ("detectron2", "mvit", "MViT", "detectron2.MViT"),
    ("detrex", "eva", "SimpleFeaturePyramid", "detrex.SimpleFeaturePyramid"),
    ("detrex", "eva_02", "SimpleFeaturePyramid", "detrex.SimpleFeaturePyramid"),
    ("detrex", "resnet", "ResNet", "detrex.ResNet"),
    ("detrex", "timm_backbone", "TimmBackbone", "detrex.TimmBackbone"),
    ("detrex", "torchvision_backbone", "TorchvisionBackbone", "detrex.TorchvisionBackbone"),
    ("detrex", "torchvision_resnet", "TorchvisionResNet", "detrex.TorchvisionResNet"),
    ("detrex", "convnext", "ConvNeXt", "detrex.ConvNeXt"),
    ("detrex", "focalnet", "FocalNet", "detrex.FocalNet"),
    ("detrex", "internimage", "InternImage", "detrex.InternImage"),
    ("detrex", "eva", "EVAViT", "detrex.EVAViT"),
    ("detrex", "eva_02", "EVA02_ViT", "detrex.EVA02_ViT"),
)
# The same for what is inside a backbone.
PARTS = tuple(
    (library, "resnet", name, name)
    for library in ("detectron2", "detrex")
    for name in ("BasicStem", "ResNet.make_default_stages", "ResNet.make_stage", "make_stage")
) + tuple(("detectron2", "fpn", name, name) for name in ("LastLevelMaxPool", "LastLevelP6P7", "LastLevelP6"))
BLOCKS = tuple(
    (library, "resnet", name, name)
    for library in ("detectron2", "detrex")
    for name in ("BasicBlock", "BottleneckBlock", "DeformBottleneckBlock")
) + tuple(
    ("detectron2", "regnet", name, name)
    for name in ("SimpleStem", "ResStem", "VanillaBlock", "ResBasicBlock", "ResBottleneckBlock")
)
# A layer norm that computes in float32 whatever it is given; what it computes there is the same.
BLOCKS += (("detrex", "eva", "LayerNormWithForceFP32", "LayerNorm"),)
# Layers of torch, by the file that defines them.
LAYERS = {
    f"torch.nn.{path}{name}": name
    for file, name in (
        ("normalization", "LayerNorm"),
        ("activation", "GELU"),
        ("activation", "ReLU"),
        ("activation", "SiLU"),
    )
    for path in ("", f"modules.{file}.")
}
NORMS = {
    "FrozenBatchNorm2d": "FrozenBN",
    "detectron2.layers.FrozenBatchNorm2d": "FrozenBN",
    "detectron2.layers.batch_norm.FrozenBatchNorm2d": "FrozenBN",
    "detectron2.layers.NaiveSyncBatchNorm": "naiveSyncBN",
    "detectron2.layers.batch_norm.NaiveSyncBatchNorm": "naiveSyncBN",
    "BatchNorm2d": "BN",
    "torch.nn.BatchNorm2d": "BN",
    "torch.nn.modules.batchnorm.BatchNorm2d": "BN",
    "SyncBatchNorm": "SyncBN",
    "torch.nn.SyncBatchNorm": "SyncBN",
    "torch.nn.modules.batchnorm.SyncBatchNorm": "SyncBN",
}


def _paths(rows: tuple[tuple[str, str, str, str], ...]) -> Iterator[tuple[str, str]]:
    """Each path that a thing can be imported from: LazyConfig writes the shortest, documents others."""
    for library, file, name, meaning in rows:
        for module in ("modeling", "modeling.backbone", f"modeling.backbone.{file}"):
            yield f"{library}.{module}.{name}", meaning


TYPE_OF = dict(_paths(BACKBONES))
PART_OF = dict(_paths(PARTS))
CLASS_OF = {**NORMS, **LAYERS, **dict(_paths(BLOCKS))}


def short_class(value: Any) -> Any:
    """A class as configs without classes name it: `FrozenBN` for each path of FrozenBatchNorm2d."""
    return CLASS_OF.get(value, value) if isinstance(value, str) else value


def from_lazyconfig(raw: Any) -> Any:
    """A raw config with `type` in place of each `_target_`, and yacs keys nested; any other as it is.

    Raises:
        UnknownBackbone: a `_target_` that is no backbone of this service.
        InvalidConfig: a part that no backbone has, a reference to what is not there, or yacs options that cannot be
            read.
    """
    if not isinstance(raw, Mapping):
        return raw
    raw = _typed(_referenced(raw, (), POINTER), POINTER)
    return _nested_yacs(raw) if _is_yacs(raw) else raw


def _typed(raw: Mapping[str, Any], pointer: str) -> Mapping[str, Any]:
    """A backbone's object with `type` in place of each `_target_`, in the backbones inside it too."""
    if TARGET in raw:
        raw = _with_type(raw, f"{pointer}/{TARGET}")
    found = {key: _part(raw[key], f"{pointer}/{key}") for key in PART_KEYS if key in raw}
    for key in NESTED_KEYS:
        if isinstance(raw.get(key), Mapping):
            if pointer.count("/") > MAX_NESTING:
                raise InvalidConfig(
                    f"{pointer}/{key}", f"more than {MAX_NESTING} backbones inside each other"
                )
            found[key] = _typed(raw[key], f"{pointer}/{key}")
    return {**raw, **found} if found else raw


def _with_type(raw: Mapping[str, Any], pointer: str) -> dict[str, Any]:
    target = raw[TARGET]
    if "type" in raw:
        raise InvalidConfig(pointer, "give type or _target_, not both")
    _refuse_unreadable(target, pointer)
    if target not in TYPE_OF:
        near = [found for found, _, _ in process.extract(target, list(TYPE_OF), limit=5, score_cutoff=60)]
        raise UnknownBackbone("backbone", target, near, pointer=pointer)
    return {"type": TYPE_OF[target], **{key: value for key, value in raw.items() if key != TARGET}}


# --- references -----------------------------------------------------------------------------------

# OmegaConf's relative reference: one dot is the object that holds it, each more the object around that.
REFERENCE = re.compile(r"\$\{(\.{1,8})(\w{1,64}(?:\.\w{1,64}){0,7})\}", re.ASCII)


def _referenced(
    raw: Mapping[str, Any], around: tuple[Mapping[str, Any], ...], pointer: str
) -> Mapping[str, Any]:
    """An object with the values that its references name, in the backbones and parts inside it too."""
    within = (*around, raw)
    found: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, str) and (match := REFERENCE.fullmatch(value)):
            found[key] = _value_of(match, within, f"{pointer}/{_shown(key)}")
        elif key in (*NESTED_KEYS, "top_block") and isinstance(value, Mapping) and len(within) <= MAX_NESTING:
            found[key] = _referenced(value, within, f"{pointer}/{key}")
    return {**raw, **found} if found else raw


def _value_of(match: re.Match[str], within: tuple[Mapping[str, Any], ...], pointer: str) -> Any:
    levels, path = len(match[1]), match[2].split(".")
    value: Any = within[-levels] if levels <= len(within) else None
    for step in path:
        value = value.get(step) if isinstance(value, Mapping) else None
    if value is None or isinstance(value, Mapping) or (isinstance(value, str) and REFERENCE.fullmatch(value)):
        raise InvalidConfig(pointer, f"refers to {match[2]}, which is no value of this config")
    return value


# --- parts ----------------------------------------------------------------------------------------


def _refuse_unreadable(target: Any, pointer: str) -> None:
    if not isinstance(target, str) or not 0 < len(target) <= MAX_NAME_LENGTH:
        raise InvalidConfig(pointer, f"must be a string of 1 to {MAX_NAME_LENGTH} characters")


def _part(raw: Any, pointer: str) -> Any:
    if isinstance(raw, (list, tuple)):
        return [_part(item, f"{pointer}/{position}") for position, item in enumerate(raw)]
    if not isinstance(raw, Mapping) or TARGET not in raw:
        return raw
    target, pointer = raw[TARGET], f"{pointer}/{TARGET}"
    _refuse_unreadable(target, pointer)
    if target not in PART_OF or "type" in raw:
        detail = "give type or _target_, not both" if "type" in raw else "names no part of this backbone"
        raise InvalidConfig(pointer, detail)
    return {"type": PART_OF[target], **{key: value for key, value in raw.items() if key != TARGET}}


# --- yacs -----------------------------------------------------------------------------------------


def _is_yacs(raw: Mapping[str, Any]) -> bool:
    if raw.get("type") not in (None, *YACS_BUILDERS, *YACS_BUILDERS.values(), "detectron2.ResNet"):
        return False
    return any(_is_yacs_key(key) for key in raw) or "opts" in raw or "builder" in raw


def _is_yacs_key(key: Any) -> bool:
    return isinstance(key, str) and (key == YACS_KEY or key.startswith(f"{YACS_KEY}."))


def _nested_yacs(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Options over dotted keys over the nested object, as detectron2 merges them."""
    rest = {
        key: value for key, value in raw.items() if not _is_yacs_key(key) and key not in ("opts", "builder")
    }
    model: dict[str, Any] = {}
    if YACS_KEY in raw:
        if not isinstance(raw[YACS_KEY], Mapping):
            raise InvalidConfig(f"#/backbone/{YACS_KEY}", "must be an object")
        model = _copied(raw[YACS_KEY])
    dotted = [(key, value, f"#/backbone/{_shown(key)}") for key, value in raw.items() if _is_yacs_key(key)]
    for key, value, pointer in (*dotted, *_options(raw.get("opts"))):
        if key != YACS_KEY:
            _put(model, key.split(".")[1:], value, pointer)
    return {**rest, "type": _builder(raw, model), YACS_KEY: model}


def _copied(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Two levels: `MODEL.RESNETS.DEPTH` is the deepest that there is."""
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in mapping.items()}


def _options(raw: Any) -> Iterator[tuple[str, Any, str]]:
    """`opts`, an object or detectron2's list of keys and values in turn."""
    if raw is None:
        return
    pointer = "#/backbone/opts"
    if isinstance(raw, Mapping):
        pairs = [(key, value, f"{pointer}/{_shown(key)}") for key, value in raw.items()]
    elif isinstance(raw, (list, tuple)) and len(raw) % 2 == 0:
        turns = range(0, len(raw), 2)
        pairs = [(raw[turn], raw[turn + 1], f"{pointer}/{turn}") for turn in turns]
    else:
        raise InvalidConfig(pointer, "must be an object, or a list of keys and values in turn")
    for key, value, where in pairs:
        if not _is_yacs_key(key) or key == YACS_KEY:
            raise InvalidConfig(where, "must be a key below MODEL, such as MODEL.RESNETS.DEPTH")
        yield key, value, where


def _put(model: dict[str, Any], path: list[str], value: Any, pointer: str) -> None:
    below = model if len(path) == 1 else model.setdefault(path[0], {})
    if len(path) > 2 or not isinstance(below, dict):
        raise InvalidConfig(pointer, "there is no such key")
    below[path[-1]] = value


def _builder(raw: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """The type of a builder: of `type`, `builder` or `MODEL.BACKBONE.NAME`; that of ResNet where none is given."""
    given, pointer = raw.get("builder"), "#/backbone/builder"
    if given is None and raw.get("type") is not None:
        return YACS_BUILDERS.get(str(raw["type"]).removeprefix(YACS_SCOPE), YACS_BUILDER)
    if given is None:
        below = model.get("BACKBONE")
        given = below.get("NAME") if isinstance(below, Mapping) else None
        pointer = "#/backbone/MODEL/BACKBONE/NAME"
    if given is None:
        return YACS_BUILDER
    _refuse_unreadable(given, pointer)
    if given not in YACS_BUILDERS:
        near = [name for name, _, _ in process.extract(given, list(YACS_BUILDERS), limit=5, score_cutoff=60)]
        raise UnknownBackbone("builder", given, near, pointer=pointer)
    return YACS_BUILDERS[given]


def _shown(key: Any) -> str:
    return str(key)[:MAX_NAME_LENGTH].replace("~", "~0").replace("/", "~1")
