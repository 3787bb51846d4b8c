"""DyHead (Dai et al., arXiv:2106.08322) as mmdet has it: attention over levels, places and channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import NormSpec, make_norm
from service.backbones.openmmlab import ActivationSpec, ConvModule, HardSigmoid
from service.necks.base import LevelFacts, Neck, require_maps
from service.necks.layers import deformed
from service.necks.openmmlab import OpenMMLabNeckConfig, Width, make_neck_family, numbered, require_widths

GROUPS = 16
NORM = NormSpec("gn", groups=GROUPS)
PLACES = 9  # of a 3x3 kernel


@dataclass(frozen=True)
class DyHeadSpec:
    """What decides the numbers and the names of the weights."""

    inputs: int
    outputs: int
    blocks: int


class SpatialConv(nn.Module):
    """A deformable convolution, whose offsets are given to it, and a group norm; keys `conv`, `norm`."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm = make_norm(NORM, outputs)

    def forward(self, maps: Tensor, offset: Tensor, mask: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride], the offsets of a level as large or larger.

        Those of a larger level are read as mmcv's operator reads them: of each image as many numbers as it needs,
        from the first on, whatever their place. Its checkpoints are trained that way.

        Raises:
            ValueError: the offsets are of a smaller level.
        """
        stride = self.conv.stride[0]
        height, width = ((side - 1) // stride + 1 for side in maps.shape[2:])
        offset, mask = (_first_numbers(values, height, width) for values in (offset, mask))
        found: Tensor = self.norm(deformed(self.conv, maps, offset, mask))
        return found


def _first_numbers(values: Tensor, height: int, width: int) -> Tensor:
    """[n, c, h, w] to [n, c, height, width] of each image's first numbers."""
    channels, needed = values.shape[1], values.shape[1] * height * width
    if values[0].numel() < needed:
        raise ValueError(f"offsets of {tuple(values.shape[2:])} do not do for {(height, width)}")
    return values.flatten(1)[:, :needed].reshape(-1, channels, height, width)


class DynamicReLU(nn.Module):
    """The larger of two lines, whose slopes and offsets are made of the means (Chen et al., arXiv:2003.10027).

    Keys `conv1.conv`, `conv2.conv`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(width, width // 4, 1, norm=None, activation=ActivationSpec())
        gate = ActivationSpec("hard_sigmoid")
        self.conv2 = ConvModule(width // 4, 4 * width, 1, norm=None, activation=gate)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        lines = self.conv2(self.conv1(maps.mean((2, 3), keepdim=True))) - 0.5
        slope, base, other_slope, other_base = lines.chunk(4, 1)
        return torch.maximum(maps * (2 * slope + 1) + base, maps * (2 * other_slope) + other_base)


class Block(nn.Module):
    """A block; keys `spatial_conv_high`, `_mid`, `_low`, `_offset`, `scale_attn_module.1`, `task_attn_module`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs
        self.spatial_conv_high = SpatialConv(inputs, outputs)
        self.spatial_conv_mid = SpatialConv(inputs, outputs)
        self.spatial_conv_low = SpatialConv(inputs, outputs, stride=2)
        self.spatial_conv_offset = nn.Conv2d(inputs, 3 * PLACES, 3, padding=1)
        self.scale_attn_module = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(outputs, 1, 1), nn.ReLU(), HardSigmoid()
        )
        self.task_attn_module = DynamicReLU(outputs)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, inputs, h_i, w_i] each, to [n, outputs, h_i, w_i] each.

        Raises:
            ValueError: the levels do not halve.
        """
        _require_halves(features)
        if features[0].is_meta:  # attention leaves sizes as they are, and torch takes long to find that out
            return [maps.new_empty(len(maps), self.outputs, *maps.shape[2:]) for maps in features]
        return [self._level(features, level) for level in range(len(features))]

    def _level(self, features: Sequence[Tensor], level: int) -> Tensor:
        """A level with those above and below it, each weighed by its own mean."""
        maps = features[level]
        found = self.spatial_conv_offset(maps)
        offset, mask = found[:, : 2 * PLACES], found[:, 2 * PLACES :].sigmoid()
        views = [self.spatial_conv_mid(maps, offset, mask)]
        if level > 0:
            views.append(self.spatial_conv_low(features[level - 1], offset, mask))
        weighed = [view * self.scale_attn_module(view) for view in views]
        if level < len(features) - 1:
            high = self.spatial_conv_high(features[level + 1], offset, mask)
            high = F.interpolate(high, size=maps.shape[2:], mode="bilinear", align_corners=True)
            weighed.append(high * self.scale_attn_module(high))
        total: Tensor = self.task_attn_module(torch.stack(weighed).sum(0) / len(weighed))
        return total


def _require_halves(features: Sequence[Tensor]) -> None:
    """Refuse levels that are not half of the one before, rounded up."""
    for maps, above in pairwise(features):
        if any((side + 1) // 2 != half for side, half in zip(maps.shape[2:], above.shape[2:], strict=True)):
            raise ValueError(f"{tuple(above.shape[2:])} is not half of {tuple(maps.shape[2:])}")


class DyHead(Neck):
    """Keys `dyhead_blocks.{i}`."""

    def __init__(self, spec: DyHeadSpec) -> None:
        super().__init__()
        widths = [spec.inputs, *[spec.outputs] * (spec.blocks - 1)]
        self.dyhead_blocks = nn.Sequential(*(Block(width, spec.outputs) for width in widths))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, inputs, h_i, w_i] each, halving, to [n, outputs, h_i, w_i] each."""
        found: list[Tensor] = self.dyhead_blocks(features)
        return found


class DyHeadConfig(OpenMMLabNeckConfig):
    """`mmdet.DyHead`."""

    NETWORK: ClassVar[str] = "DyHead"
    VIEW: ClassVar[frozenset[str]] = OpenMMLabNeckConfig.VIEW | {"zero_init_offset"}

    conv_cfg: None = None
    in_channels: Width = Field(description="Channels of every level that goes in, which are all as wide.")
    out_channels: Width = Field(description="Channels of every level that comes out, a multiple of 16.")
    num_blocks: Annotated[int, Field(strict=True, ge=1, le=12)] = Field(
        6, description="Blocks behind each other."
    )
    zero_init_offset: bool = Field(True, description="Where training starts.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.out_channels % GROUPS:
            yield "out_channels", f"{self.out_channels} is not a multiple of {GROUPS}"

    def spec(self) -> DyHeadSpec:
        """The neutral spelling."""
        return DyHeadSpec(self.in_channels, self.out_channels, self.num_blocks)

    def takes(self) -> tuple[int, ...]:
        """The width of any level."""
        return (self.in_channels,)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not maps of this width."""
        require_maps(levels, self.type)
        require_widths(self.takes() * len(levels), levels)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in."""
        return numbered([self.out_channels] * len(levels), [level.stride for level in levels])


DY_HEAD = make_neck_family(
    DyHeadConfig, DyHead, example={"in_channels": 2048, "out_channels": 256, "num_blocks": 2}
)
