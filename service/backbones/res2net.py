"""Res2Net (Gao et al., arXiv:1904.01169) of mmpretrain and mmdet, with their key names."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import make_norm
from service.backbones.openmmlab_detection import DetectionKeys
from service.backbones.resnet import (
    BOTTLENECK_DEPTHS,
    DepthConfig,
    Place,
    PretrainKeys,
    ResNet,
    ResNetSpec,
    bottleneck_strides,
    conv1x1,
    family,
    middle,
)
from service.checkpoints.layouts import Naming

BottleneckDepth = Literal[50, 101, 152]


@dataclass(frozen=True)
class Scales:
    """How a bottleneck's 3x3 is split.

    `count` slices of the channels; `widths` are the channels of one, by stage. A stage's first block pools the
    last slice; `pool_at_stride_1`: where it does not stride, too, as mmpretrain does and mmdet does not.
    """

    count: int
    widths: tuple[int, ...]
    pool_at_stride_1: bool


class Res2NetBlock(nn.Module):
    """Slices of the channels, each convolved with the one before added: keys `convs.{i}`, `bns.{i}`."""

    def __init__(self, spec: ResNetSpec, scales: Scales, place: Place, downsample: nn.Module | None) -> None:
        super().__init__()
        first, second = bottleneck_strides(spec, place)
        self.width, self.adds_previous, self.norm_kind = (
            scales.widths[place.stage],
            not place.first,
            spec.norm.kind,
        )
        inner, outputs, dilation = (
            self.width * scales.count,
            spec.widths[place.stage],
            spec.dilations[place.stage],
        )
        self.conv1 = conv1x1(place.inputs, inner, stride=first)
        self.add_module(f"{spec.norm.kind}1", make_norm(spec.norm, inner))
        self.conv3 = conv1x1(inner, outputs)
        self.add_module(f"{spec.norm.kind}3", make_norm(spec.norm, outputs))
        self.downsample = downsample
        pools = place.first and (second != 1 or scales.pool_at_stride_1)
        self.pool = nn.AvgPool2d(3, stride=second, padding=1) if pools else nn.Identity()
        slices = range(scales.count - 1)
        self.convs = nn.ModuleList(
            middle(spec, place, self.width, stride=second, dilation=dilation) for _ in slices
        )
        self.bns = nn.ModuleList(make_norm(spec.norm, self.width) for _ in slices)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = torch.relu_(getattr(self, f"{self.norm_kind}1")(self.conv1(maps)))
        joined = torch.cat(self._convolved(torch.split(inner, self.width, dim=1)), dim=1)
        return torch.relu_(getattr(self, f"{self.norm_kind}3")(self.conv3(joined)) + shortcut)

    def _convolved(self, slices: tuple[Tensor, ...]) -> list[Tensor]:
        found: list[Tensor] = []
        for piece, convolution, norm in zip(slices[:-1], self.convs, self.bns, strict=True):
            added = piece + found[-1] if self.adds_previous and found else piece
            found.append(torch.relu_(norm(convolution(added))))
        return [*found, self.pool(slices[-1])]


class Res2Net(ResNet):
    """A ResNet whose bottlenecks work on slices of their channels."""

    def __init__(self, spec: ResNetSpec, scales: Scales) -> None:
        self.scales = scales
        super().__init__(spec)

    def block(self, place: Place, downsample: nn.Module | None) -> nn.Module:
        """One residual block."""
        return Res2NetBlock(self.spec, self.scales, place, downsample)


class Res2NetKeys(DepthConfig):
    """What Res2Net takes in either library."""

    # Res2Net's shortcuts pool at every stride in either library.
    POOL_AT_STRIDE_1: ClassVar[bool] = True
    SLICE_POOL_AT_STRIDE_1: ClassVar[bool] = True

    depth: BottleneckDepth = Field(description="Number of layers.")
    scales: Annotated[int, Field(strict=True, ge=2, le=64)] = Field(
        4, description="Slices of a bottleneck's channels."
    )
    base_width: Annotated[int, Field(strict=True, ge=1, le=512)] = Field(
        26, description="Channels of a slice in the first stage."
    )

    def slices(self) -> Scales:
        """How a bottleneck's 3x3 is split."""
        ratio = self.base_width / self.base_channels
        widths = (math.floor(self.base_channels * 2**stage * ratio) for stage in range(self.num_stages))
        return Scales(self.scales, tuple(widths), self.SLICE_POOL_AT_STRIDE_1)

    def network(self) -> ResNet:
        """The network of these keys, without its weights."""
        return Res2Net(self.spec(), self.slices())

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling."""
        scales = self.slices()
        return {**super().architecture(), "scales": scales.count, "slices": scales.widths}

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all residual networks, and norms over slices."""
        yield from super().faults()
        groups = self.norm_cfg.num_groups or 1
        if any(width % groups for width in self.slices().widths):
            yield "norm_cfg/num_groups", f"{groups} groups do not divide {self.slices().widths[0]} channels"


class PretrainRes2NetKeys(Res2NetKeys, PretrainKeys):
    """`mmpretrain.Res2Net`."""

    TYPE: ClassVar[str] = "mmpretrain.Res2Net"

    deep_stem: bool = Field(True, description="Three 3x3 convolutions in place of the 7x7.")
    avg_down: bool = Field(True, description="Pools in a shortcut instead of striding.")


class DetectionRes2NetKeys(DetectionKeys, Res2NetKeys):
    """`mmdet.Res2Net`, which has one style, stem and shortcut whatever its keys say."""

    TYPE: ClassVar[str] = "mmdet.Res2Net"
    HAS_DEFORMABLE: ClassVar[bool] = True
    SLICE_POOL_AT_STRIDE_1: ClassVar[bool] = False

    style: Literal["pytorch"] = "pytorch"
    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True

    def middle_widths(self) -> tuple[int, ...]:
        """Channels of what may be deformable, by stage."""
        return self.slices().widths


RES2NET_NAMES = Naming(
    "Res2Net",
    own=("mmpretrain", "mmdet", "timm"),
    marks=("conv1.weight", "layer1.0.convs.0.weight", "layer4.0.convs.0.weight"),
)


RES2NET = family(PretrainRes2NetKeys, naming=RES2NET_NAMES, choices=BOTTLENECK_DEPTHS)
MMDET_RES2NET = family(DetectionRes2NetKeys, naming=RES2NET_NAMES, choices=BOTTLENECK_DEPTHS)
