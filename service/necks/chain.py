"""Necks one behind the other, as `neck=[dict(type='FPN', …), dict(type='BFP', …)]` makes them in OpenMMLab.

They are a `Sequential` there: the weights of the first are under `0.`, those of the second under `1.`, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ConfigDict, InstanceOf
from torch import Tensor

from service.backbones.registry import Registry, Resolved, json_type
from service.checkpoints.load import load_strict
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import Fault, InvalidConfig
from service.necks.base import (
    POINTER,
    LevelFacts,
    Neck,
    NeckConfig,
    NeckDescription,
    NeckFamily,
    WeightedNeckConfig,
)

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

MAX_NECKS = 4


@dataclass(frozen=True)
class Link:
    """One neck of a chain."""

    type: str
    family: NeckFamily[Any]
    config: NeckConfig


class ChainConfig(WeightedNeckConfig):
    """The necks of a chain, resolved. Its weights are those of the checkpoint that fills the backbone."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    NETWORK: ClassVar[str] = "Chain"

    links: tuple[InstanceOf[Link], ...]

    def architecture(self) -> dict[str, Any]:
        """Those of its necks, in order."""
        return {"type": self.NETWORK, "necks": [link.config.architecture() for link in self.links]}


class Chain(Neck):
    """Keys `0`, `1` and on, in order."""

    def __init__(self, necks: Sequence[Neck]) -> None:
        super().__init__()
        for place, neck in enumerate(necks):
            self.add_module(str(place), neck)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """What the first takes, to what the last gives."""
        for neck in self.children():
            features = neck(features)
        return features


def read_chain(
    raw: Sequence[Any],
    registry: Registry[NeckFamily[Any]],
    validated: Callable[[Resolved[NeckFamily[Any]], Mapping[str, Any]], NeckConfig],
) -> ChainConfig:
    """The chain of a raw list.

    Args:
        validated: the config of a resolved type and its raw keys, which blames keys below `#/neck`.

    Raises:
        UnknownBackbone, InvalidConfig: what is wrong, below `#/neck/{place}`.
    """
    if not 1 <= len(raw) <= MAX_NECKS:
        raise InvalidConfig(POINTER, f"a chain of {len(raw)} necks; give 1 to {MAX_NECKS}")
    links = []
    for place, given in enumerate(raw):
        link = {"type": given} if isinstance(given, str) else given
        pointer = f"{POINTER}/{place}"
        resolved = registry.resolve(json_type(link, pointer=pointer), pointer=f"{pointer}/type")
        with _blaming(place):
            config = validated(resolved, link)
            _refuse_own_weights(config)
        links.append(Link(resolved.type, resolved.family, config))
    return ChainConfig(type=", ".join(link.type for link in links), links=tuple(links))


def _refuse_own_weights(config: NeckConfig) -> None:
    ref = config.weights()
    if ref is not None:
        detail = (
            "the necks of a chain have their weights in the backbone's checkpoint, under neck.0., neck.1., …"
        )
        raise InvalidConfig(ref.pointer, detail)


@contextmanager
def _blaming(place: int) -> Iterator[None]:
    """Faults of `#/neck` become those of the neck at a place of the chain."""
    try:
        yield
    except InvalidConfig as error:
        first, *more = (
            Fault(f"{POINTER}/{place}{fault.pointer.removeprefix(POINTER)}", fault.detail)
            for fault in error.faults
        )
        raise InvalidConfig(first.pointer, first.detail, *more) from error


def _described(config: ChainConfig, levels: Sequence[LevelFacts]) -> list[NeckDescription]:
    """What each neck gives, in order."""
    found = []
    for place, link in enumerate(config.links):
        with _blaming(place):
            found.append(link.family.describe(link.config, levels))
        levels = found[-1].levels
    return found


def _describe(config: ChainConfig, levels: Sequence[LevelFacts]) -> NeckDescription:
    found = _described(config, levels)
    return NeckDescription(
        found[-1].levels, sum(one.parameters for one in found), sum(one.bytes for one in found)
    )


def _build(config: ChainConfig, levels: Sequence[LevelFacts]) -> Chain:
    taken = [levels, *(one.levels for one in _described(config, levels)[:-1])]
    return Chain(
        [link.family.build(link.config, inputs) for link, inputs in zip(config.links, taken, strict=True)]
    )


def _load(
    config: ChainConfig, levels: Sequence[LevelFacts], state: StateDict, ref: WeightsRef
) -> tuple[Chain, LoadedKeys]:
    network = _build(config, levels)
    return network, load_strict(network, state, ref, part="neck")


def _example(type_name: str) -> Mapping[str, Any]:
    return {"type": type_name}


CHAIN = NeckFamily(config=ChainConfig, describe=_describe, build=_build, load=_load, example=_example)
