"""A detector's or classifier's whole config as OpenMMLab's libraries run it: which backbone, neck and preprocessing.

The backbone is `model.backbone`, the neck `model.neck`. `default_scope` is the library that types without a scope
are of. Weights follow mmengine's order: `load_from` goes over an `init_cfg` of the model, which goes over those of
its parts; the keys of both begin with `backbone.` and `neck.`. Images are prepared as `data_preprocessor` says, in
mmdet 2.x and mmcls 0.x as `Normalize` of the test pipeline or `img_norm_cfg`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.config.pipelines import PipelineFacts, read_pipeline
from service.config.plain import as_json
from service.config.preprocess import IMPLIED_MODES
from service.config.python_files import Refused
from service.errors import InvalidConfig

# Their `pretrained` is a checkpoint of the whole model; a detector's is one of its backbone.
CLASSIFIERS = frozenset({"ImageClassifier", "TimmClassifier", "HuggingFaceClassifier"})
CLASSIFIER_SCOPES = frozenset({"mmpretrain", "mmcls", "mmselfsup"})
WEIGHT_KEYS = ("init_cfg", "checkpoint", "pretrained")
# Where a test pipeline may be, the one that is run first.
PIPELINES = (
    ("test_dataloader", "dataset", "pipeline"),
    ("test_dataloader", "dataset", "dataset", "pipeline"),
    ("data", "test", "pipeline"),
    ("test_pipeline",),
    ("val_dataloader", "dataset", "pipeline"),
)


@dataclass(frozen=True)
class WholeConfig:
    """The served parts of a whole config, and what of it is done differently."""

    backbone: dict[str, Any]
    neck: Any
    preprocess: Any
    notes: tuple[str, ...]


def read_whole(values: Mapping[str, Any], name: str) -> WholeConfig:
    """The parts of a config that has a `model`.

    Raises:
        InvalidConfig: it has no backbone where one is looked for, or what is needed is not data.
    """
    model = _object(values["model"], "#/model")
    scope = as_json(values.get("default_scope"), "#/default_scope")
    backbone = scoped(_backbone(model, name), scope, "#/backbone")
    neck = _neck(model, scope)
    weights = _weights(values, model)
    notes = []
    if weights is not None:
        backbone, neck = _filled(backbone, weights, "backbone."), _without_weights(neck)
        notes.append(f"{weights.key} gives the weights of the backbone, and of the neck")
    elif (pretrained := _pretrained(model)) is not None:
        backbone = _with_pretrained(backbone, pretrained)
    preprocess, more = _preprocess(values, model, scope)
    return WholeConfig(backbone, neck, preprocess, (*notes, *more))


def _object(value: Any, pointer: str) -> Mapping[str, Any]:
    if isinstance(value, Refused):
        raise value.error(pointer)
    if not isinstance(value, dict):
        raise InvalidConfig(pointer, "must be an object")
    return value


def _backbone(model: Mapping[str, Any], name: str) -> dict[str, Any]:
    if "backbone" not in model:
        nested = [key for key, part in model.items() if isinstance(part, dict) and "backbone" in part]
        hint = f"; there is one in model.{nested[0]}" if nested else ""
        raise InvalidConfig("#/model/backbone", f"the config {name} has no model.backbone{hint}")
    return dict(_object(as_json(model["backbone"], "#/model/backbone"), "#/model/backbone"))


def _neck(model: Mapping[str, Any], scope: str | None) -> Any:
    neck = as_json(model.get("neck"), "#/model/neck")
    return None if neck is None else scoped_neck(neck, scope)


def scoped_neck(neck: Any, scope: str | None) -> Any:
    """A neck whose type says the library; a chain stays a list even of one, whose weights are under `neck.0.`."""
    if isinstance(neck, list):
        return [scoped(part, scope, f"#/neck/{position}") for position, part in enumerate(neck)]
    return scoped(neck, scope, "#/neck")


def scoped(part: Any, scope: str | None, pointer: str) -> Any:
    """A part whose type says the library: its own scope, `_scope_`, or the config's `default_scope`."""
    if not isinstance(part, dict):
        return part
    own = part.get("_scope_", scope)
    kept = {key: value for key, value in part.items() if key != "_scope_"}
    kind = kept.get("type")
    if own is None or not isinstance(kind, str) or "." in kind:
        return kept
    if not isinstance(own, str) or not own.isidentifier() or len(own) > 32:
        raise InvalidConfig(pointer, "its scope is not the name of a library")
    return {**kept, "type": f"{own}.{kind}"}


@dataclass(frozen=True)
class _Weights:
    """A checkpoint of a whole model: the key that names it, its name, and what its keys begin with."""

    key: str
    checkpoint: str
    prefix: str = ""


def _weights(values: Mapping[str, Any], model: Mapping[str, Any]) -> _Weights | None:
    """The checkpoint that fills all of the model; None where each part has its own."""
    loaded = as_json(values.get("load_from"), "#/load_from")
    if isinstance(loaded, str) and loaded:
        return _Weights("load_from", loaded)
    found = as_json(model.get("init_cfg"), "#/model/init_cfg")
    for init in found if isinstance(found, list) else [found]:
        if (
            isinstance(init, dict)
            and init.get("type") == "Pretrained"
            and isinstance(init.get("checkpoint"), str)
        ):
            return _Weights("model.init_cfg", init["checkpoint"], _dotted(init.get("prefix")))
    pretrained = _pretrained(model)
    return _Weights("model.pretrained", pretrained) if pretrained and _is_classifier(model, None) else None


def _pretrained(model: Mapping[str, Any]) -> str | None:
    """The checkpoint of `model.pretrained`, which is the backbone's in mmdet 2.x and a classifier's whole model."""
    found = as_json(model.get("pretrained"), "#/model/pretrained")
    return found if isinstance(found, str) and found else None


def _with_pretrained(backbone: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    if backbone.get("init_cfg") is not None:
        raise InvalidConfig("#/model/pretrained", "the backbone has an init_cfg of its own; give one of them")
    return {**backbone, "init_cfg": {"type": "Pretrained", "checkpoint": checkpoint}}


def _dotted(prefix: Any) -> str:
    return "" if not isinstance(prefix, str) or not prefix else prefix.removesuffix(".") + "."


def _filled(backbone: dict[str, Any], weights: _Weights, prefix: str) -> dict[str, Any]:
    """A backbone with the weights of the whole model."""
    init = {"type": "Pretrained", "checkpoint": weights.checkpoint, "prefix": weights.prefix + prefix}
    return {**{key: value for key, value in backbone.items() if key not in WEIGHT_KEYS}, "init_cfg": init}


def _without_weights(neck: Any) -> Any:
    """A neck that the backbone's checkpoint fills, if it has a neck."""
    if isinstance(neck, list):
        return [_without_weights(part) for part in neck]
    if not isinstance(neck, dict):
        return neck
    return {key: value for key, value in neck.items() if key not in WEIGHT_KEYS}


def _is_classifier(model: Mapping[str, Any], scope: str | None) -> bool:
    kind = model.get("type")
    if isinstance(kind, str) and kind.rpartition(".")[2] in CLASSIFIERS:
        return True
    return scope in CLASSIFIER_SCOPES


# --- how images are prepared ------------------------------------------------------------------------


def _preprocess(
    values: Mapping[str, Any], model: Mapping[str, Any], scope: str | None
) -> tuple[Any, tuple[str, ...]]:
    """The config's `preprocess`, and what it does not say."""
    if values.get("preprocess") is not None:
        return as_json(values["preprocess"], "#/preprocess"), ()
    facts = read_pipeline(_pipeline(values))
    normalising = _normalising(values, model, facts)
    notes = list(facts.notes)
    if normalising is None:
        notes.append("there is no data_preprocessor: images are normalised as by default")
    placing = dict(facts.placing) or _placing_of_library(model, scope, normalising)
    said: dict[str, Any] = {} if normalising is None else {"data_preprocessor": normalising}
    if facts.divisor is not None and normalising is not None and "pad_size_divisor" not in normalising:
        said["data_preprocessor"] = {**normalising, "pad_size_divisor": facts.divisor}
    return {**said, **placing} or None, tuple(notes)


def _normalising(
    values: Mapping[str, Any], model: Mapping[str, Any], facts: PipelineFacts
) -> dict[str, Any] | None:
    for holder, pointer in ((model, "#/model/data_preprocessor"), (values, "#/data_preprocessor")):
        found = as_json(holder.get("data_preprocessor"), pointer)
        if found is not None:
            return {key: value for key, value in _object(found, pointer).items() if key != "_scope_"}
    if facts.normalising:
        return dict(facts.normalising)
    older = as_json(values.get("img_norm_cfg"), "#/img_norm_cfg")
    return {"to_rgb": True, **older} if isinstance(older, dict) else None


def _placing_of_library(
    model: Mapping[str, Any], scope: str | None, normalising: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Images of anything but a classifier keep their size, where neither pipeline nor preprocessor says more."""
    kind = str((normalising or {}).get("type", "")).rpartition(".")[2]
    if _is_classifier(model, scope) or IMPLIED_MODES.get(kind) is not None:
        return {}
    return {"mode": "native"}


def _pipeline(values: Mapping[str, Any]) -> Any:
    """The first pipeline there is, as data."""
    return next((found for path in PIPELINES if (found := _at(values, path)) is not None), None)


def _at(values: Any, path: tuple[str, ...]) -> Any:
    for depth, key in enumerate(path):
        if isinstance(values, Refused):
            raise values.error("#/" + "/".join(path[:depth]))
        if not isinstance(values, dict) or key not in values:
            return None
        values = values[key]
    return as_json(values, "#/" + "/".join(path))
