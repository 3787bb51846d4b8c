"""GlobalAveragePooling, OpenMMLab's neck of classifiers: each map becomes the mean over its pixels.

Tokens whose channels come first, as MlpMixer gives them, become the mean over the tokens (`dim=1`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from service.checkpoints.load import load_strict
from service.config.spec import Layout, LoadedKeys, WeightsRef
from service.errors import InvalidConfig
from service.necks.base import LevelFacts, Neck, NeckConfig, NeckDescription, NeckFamily, require_maps
from service.necks.openmmlab import OpenMMLabNeckConfig, make_neck_family

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

NAME = "GlobalAveragePooling"
# how many dimensions are left beside those of images and channels
DIMENSIONS: Mapping[Layout, int] = {"NCHW": 2, "NCL": 1}


class GlobalAveragePoolingConfig(NeckConfig):
    """`mmpretrain.GlobalAveragePooling`, which is also `mmcls.GlobalAveragePooling`. It has no weights."""

    TYPE: ClassVar[str] = f"mmpretrain.{NAME}"

    dim: Literal[1, 2, 3] = Field(
        2, description="Spatial dimensions of what is pooled; 2 for maps, 1 for NCL tokens."
    )

    def architecture(self) -> dict[str, Any]:
        """The same under either name of the type."""
        return {"type": self.TYPE, "dim": self.dim}


class GlobalAveragePooling(Neck):
    """Means over the pixels of each map, or over the tokens."""

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c, h, w] or [n, c, l] each, to [n, c] each."""
        return [feature.mean(dim=tuple(range(2, feature.ndim))) for feature in features]


def _describe(config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts]) -> NeckDescription:
    """Each level keeps its index and name.

    Raises:
        InvalidConfig: a level is neither a map nor NCL tokens, or `dim` is not that of a level.
    """
    require_maps([level for level in levels if level.layout != "NCL"], NAME)
    for level in levels:
        if (has := DIMENSIONS[level.layout]) != config.dim:
            detail = f"level {level.name} ({level.layout}) has dimension {has}, not {config.dim}"
            raise InvalidConfig("#/neck/dim", detail)
    return NeckDescription(tuple(replace(level, layout="NC", stride=None) for level in levels))


def _build(config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts]) -> GlobalAveragePooling:
    _describe(config, levels)
    return GlobalAveragePooling()


def _load(
    config: GlobalAveragePoolingConfig, levels: Sequence[LevelFacts], state: StateDict, ref: WeightsRef
) -> tuple[GlobalAveragePooling, LoadedKeys]:
    network = _build(config, levels)
    return network, load_strict(network, state, ref, part="neck")


def _example(type_name: str) -> Mapping[str, Any]:
    return {"type": type_name}


GLOBAL_AVERAGE_POOLING = NeckFamily(
    config=GlobalAveragePoolingConfig, describe=_describe, build=_build, load=_load, example=_example
)


# --- mmdet.GlobalAveragePooling -------------------------------------------------------------------


@dataclass(frozen=True)
class WindowSpec:
    """The window that is averaged and its steps, as (height, width); None is the whole map."""

    kernel: tuple[int, int] | None
    stride: tuple[int, int] | None


class WindowPooling(Neck):
    """Means over windows of each map, all of them beside each other in one vector."""

    def __init__(self, spec: WindowSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c, h, w] each, to [n, c * windows] each."""
        kernel, stride = self.spec.kernel, self.spec.stride
        if kernel is None:
            return [maps.mean((2, 3)) for maps in features]
        return [F.avg_pool2d(maps, kernel, stride).flatten(1) for maps in features]


Side = Annotated[int, Field(strict=True, ge=1, le=256)]


class WindowPoolingConfig(OpenMMLabNeckConfig):
    """`mmdet.GlobalAveragePooling`, which its trackers have. It has no weights."""

    NETWORK: ClassVar[str] = "WindowPooling"

    conv_cfg: None = None
    kernel_size: Side | tuple[Side, Side] | None = Field(
        None, description="The window that is averaged; null is the whole map."
    )
    stride: Side | tuple[Side, Side] | None = Field(None, description="Of windows; null is kernel_size.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.kernel_size is None and self.stride is not None:
            yield "stride", "needs a kernel_size"

    def spec(self) -> WindowSpec:
        """The neutral spelling."""
        return WindowSpec(_pair(self.kernel_size), _pair(self.stride))

    def takes(self) -> tuple[int, ...]:
        """Nothing in particular."""
        return ()

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not maps."""
        require_maps(levels, self.type)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """Each level keeps its index and name; its channels are those of one window."""
        return tuple(replace(level, layout="NC", stride=None) for level in levels)


def _pair(side: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (side, side) if isinstance(side, int) else side


WINDOW_POOLING = make_neck_family(WindowPoolingConfig, WindowPooling, example={})
