"""GlobalAveragePooling, OpenMMLab's neck of classifiers: each map becomes the mean over its pixels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from service.checkpoints.load import load_strict
from service.config.spec import LoadedKeys, WeightsRef
from service.errors import InvalidConfig
from service.necks.base import LevelFacts, Neck, NeckConfig, NeckDescription, NeckFamily, require_maps

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NAME = "GlobalAveragePooling"


class GlobalAveragePoolingConfig(NeckConfig):
    """`mmpretrain.GlobalAveragePooling`, which is also `mmcls.GlobalAveragePooling`. It has no weights."""

    TYPE: ClassVar[str] = f"mmpretrain.{NAME}"

    dim: Literal[1, 2, 3] = Field(2, description="Spatial dimensions of what is pooled; 2 for maps.")

    def architecture(self) -> dict[str, Any]:
        """The same under either name of the type."""
        return {"type": self.TYPE, "dim": self.dim}


class GlobalAveragePooling(Neck):
    """Means over the pixels of each map."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c, h, w] each, to [n, c] each."""
        return [feature.mean(dim=(2, 3)) for feature in features]


def _describe(config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts]) -> NeckDescription:
    """Each level keeps its index and name.

    Raises:
        InvalidConfig: a level is not a map, or `dim` is not that of maps.
    """
    require_maps(levels, NAME)
    if config.dim != 2:
        raise InvalidConfig("#/neck/dim", f"the levels are maps of 2 dimensions, not of {config.dim}")
    return NeckDescription(tuple(replace(level, layout="NC", stride=None) for level in levels))


def _build(config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts]) -> GlobalAveragePooling:
    _describe(config, levels)
    return GlobalAveragePooling()


def _load(
    config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts], state: StateDict, ref: WeightsRef
) -> tuple[GlobalAveragePooling, LoadedKeys]:
    network = _build(config, levels)
    return network, load_strict(network, state, ref)


def _example(type_name: str) -> Mapping[str, Any]:
    return {"type": type_name}


GLOBAL_AVERAGE_POOLING = NeckFamily(
    config=GlobalAveragePoolingConfig, describe=_describe, build=_build, load=_load, example=_example
)
