"""BFP, Libra R-CNN's balanced feature pyramid (Pang et al., arXiv:1904.02701), as mmdet has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import ActivationSpec, ConvModule
from service.necks.base import LevelFacts, Neck
from service.necks.openmmlab import (
    MAX_LEVELS,
    NO_ACTIVATION,
    OpenMMLabNeckConfig,
    Width,
    make_neck_family,
    norm_spec,
    numbered,
)


@dataclass(frozen=True)
class BFPSpec:
    """What decides the numbers and the names of the weights; levels meet at the size of level `place`."""

    width: int
    levels: int
    place: int
    refine: Literal["conv", "non_local"] | None
    norm: NormSpec | None


class NonLocal(nn.Module):
    """Every pixel with a mean of all, weighed by their products (Wang et al., arXiv:1711.07971).

    Keys `g`, `conv_out`, `theta`, `phi`.
    """

    def __init__(self, width: int, norm: NormSpec | None) -> None:
        super().__init__()
        self.g = ConvModule(width, width, 1, norm=None, activation=NO_ACTIVATION)
        self.conv_out = ConvModule(width, width, 1, norm=norm, activation=NO_ACTIVATION)
        self.theta = ConvModule(width, width, 1, norm=None, activation=NO_ACTIVATION)
        self.phi = ConvModule(width, width, 1, norm=None, activation=NO_ACTIVATION)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        asked, known, held = (
            layer(maps).flatten(2).transpose(1, 2) for layer in (self.theta, self.phi, self.g)
        )
        mixed = F.scaled_dot_product_attention(asked, known, held, scale=1.0)
        added: Tensor = maps + self.conv_out(mixed.transpose(1, 2).reshape(maps.shape))
        return added


class BFP(Neck):
    """The mean of all levels, refined (`refine`) and added to each."""

    def __init__(self, spec: BFPSpec) -> None:
        super().__init__()
        self.place = spec.place
        self.refine: nn.Module = nn.Identity()
        if spec.refine == "conv":
            self.refine = ConvModule(spec.width, spec.width, 3, norm=spec.norm, activation=ActivationSpec())
        elif spec.refine == "non_local":
            self.refine = NonLocal(spec.width, spec.norm)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c, h_i, w_i] each, to the same shapes."""
        size = features[self.place].shape[2:]
        gathered = [_resized(maps, size, smaller=i < self.place) for i, maps in enumerate(features)]
        mean = self.refine(torch.stack(gathered).sum(0) / len(gathered))
        return [
            maps + _resized(mean, maps.shape[2:], smaller=i >= self.place) for i, maps in enumerate(features)
        ]


def _resized(maps: Tensor, size: Sequence[int], *, smaller: bool) -> Tensor:
    """[n, c, h, w] to a size: the largest pixel where it gets smaller, else the nearest."""
    if smaller:
        return F.adaptive_max_pool2d(maps, list(size))
    return F.interpolate(maps, size=list(size), mode="nearest")


class BFPConfig(OpenMMLabNeckConfig):
    """`mmdet.BFP`."""

    NETWORK: ClassVar[str] = "BFP"

    in_channels: Width = Field(description="Channels of every level that goes in, which are all as wide.")
    num_levels: Annotated[int, Field(strict=True, ge=1, le=MAX_LEVELS)] = Field(
        description="Levels that go in and come out."
    )
    refine_level: Annotated[int, Field(strict=True, ge=0, lt=MAX_LEVELS)] = Field(
        2, description="The level at whose size they meet."
    )
    refine_type: Literal["conv", "non_local"] | None = Field(
        None, description="What the mean of the levels passes; null is nothing."
    )
    norm_cfg: NormConfig | None = Field(None, description="null is none.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.refine_level >= self.num_levels:
            yield "refine_level", f"{self.refine_level} is not a level of 0 to {self.num_levels - 1}"
        yield from self.norm_faults(self.norm_cfg, [self.in_channels])

    def spec(self) -> BFPSpec:
        """The neutral spelling."""
        norm = norm_spec(self.norm_cfg) if self.refine_type is not None else None
        return BFPSpec(self.in_channels, self.num_levels, self.refine_level, self.refine_type, norm)

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return (self.in_channels,) * self.num_levels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in."""
        return numbered(self.takes(), [level.stride for level in levels])


BFP_FAMILY = make_neck_family(
    BFPConfig,
    BFP,
    example={"in_channels": 2048, "num_levels": 1, "refine_level": 0, "refine_type": "non_local"},
)
