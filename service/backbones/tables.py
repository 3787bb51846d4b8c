"""What is known of timm's and torchvision's models without building them: the tables that ship with the service.

The JSON files beside this module are written by `python -m service.backbones.make_tables`; reading them needs
neither torch nor the libraries.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import orjson
from rapidfuzz import process

from service.config.spec import Description, FeatureInfo, PreprocessDefaults

MAX_NAME_LENGTH = 128


@dataclass(frozen=True)
class TimmEntry:
    """One architecture of timm with all its features.

    Attributes:
        module: the file of timm that it comes from, without `.py`.
        summary: one line for a list of types.
        channels, strides: of every feature, shallow to deep; all are maps.
        shapes: [height, width] of every feature at the native input size.
        indices: timm's numbers of the features; empty for 0, 1, 2, …
        default: the `out_indices` of `features_only` when none are given.
        size: native input [height, width] in pixels; `fixed` networks take no other.
        parameters, tensors, bytes: of the network that gives all features, as `building.size_of` counts them.
        tags: pretrained tags, the default first.
        unsupported: why it cannot be served; None for what can.
    """

    name: str
    module: str
    summary: str
    tags: tuple[str, ...]
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    shapes: tuple[tuple[int, int], ...] = ()
    indices: tuple[int, ...] = ()
    default: tuple[int, ...] = ()
    size: tuple[int, int] = (224, 224)
    fixed: bool = False
    parameters: int = 0
    tensors: int = 0
    bytes: int = 0
    unsupported: str | None = None

    @property
    def features(self) -> tuple[FeatureInfo, ...]:
        """The features as the service numbers them: as timm does."""
        indices = self.indices or range(len(self.channels))
        facts = zip(indices, self.channels, self.strides, self.shapes, strict=True)
        return tuple(
            FeatureInfo(index, str(index), channels, stride, "NCHW", (channels, *shape))
            for index, channels, stride, shape in facts
        )

    def description(self) -> Description:
        """The facts of the network as its library builds it by default."""
        return _description(self)


@dataclass(frozen=True)
class TorchvisionEntry:
    """One classification model of torchvision.

    Attributes:
        module: the file of torchvision that it comes from, without `.py`.
        summary: one line for a list of types.
        features: the nodes returned when a config names none, shallow to deep.
        size: native input [height, width] in pixels; `fixed` networks take no other.
        keys: the config keys that its builder takes, beside those that every model takes.
        weights_class, weights: torchvision's names of its pretrained weights, the default first.
        parameters, tensors, bytes: of the whole classification model, as `building.size_of` counts them.
    """

    name: str
    module: str
    summary: str
    features: tuple[FeatureInfo, ...]
    size: tuple[int, int]
    fixed: bool
    keys: tuple[str, ...]
    weights_class: str
    weights: tuple[str, ...]
    parameters: int
    tensors: int
    bytes: int

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches: the class token of a vision transformer."""
        return int(self.module == "vision_transformer")

    def description(self) -> Description:
        """The facts of the network as its library builds it by default."""
        return _description(self, prefix_tokens=self.prefix_tokens)


def _description(entry: TimmEntry | TorchvisionEntry, *, prefix_tokens: int = 0) -> Description:
    return Description(
        features=entry.features,
        parameters=entry.parameters,
        bytes=entry.bytes,
        in_channels=3,
        input=PreprocessDefaults(size=entry.size),
        fixed_input=entry.fixed,
        tensors=entry.tensors,
        prefix_tokens=prefix_tokens,
    )


def nearest(name: str, known: Iterable[str], *, score: int = 60) -> list[str]:
    """Up to five of the known names that are most like `name`, best first; `score` of 100 is equal."""
    found = process.extract(name[:MAX_NAME_LENGTH], list(known), limit=5, score_cutoff=score)
    return [match for match, _, _ in found]


def _read(name: str) -> Any:
    return orjson.loads(resources.files("service.backbones").joinpath("tables", name).read_bytes())


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


@cache
def timm_models() -> Mapping[str, TimmEntry]:
    """Every architecture of the pinned timm by name, in timm's order."""
    rows = _read("timm.json")
    return {name: TimmEntry(name, **{k: _tuples(v) for k, v in row.items()}) for name, row in rows.items()}


@cache
def timm_renamed() -> Mapping[str, str]:
    """Names that timm once had, and what it calls them now (`arch` or `arch.tag`)."""
    renamed: dict[str, str] = _read("timm-renamed.json")
    return renamed


@cache
def torchvision_models() -> Mapping[str, TorchvisionEntry]:
    """Every classification model of the pinned torchvision by name."""
    return {name: _torchvision_entry(name, row) for name, row in _read("torchvision.json").items()}


def _torchvision_entry(name: str, row: dict[str, Any]) -> TorchvisionEntry:
    facts = {key: _tuples(value) for key, value in row.items()}
    features = tuple(FeatureInfo(index, *feature) for index, feature in enumerate(facts.pop("features")))
    return TorchvisionEntry(name, features=features, **facts)
