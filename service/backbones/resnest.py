"""ResNeSt (Zhang et al., arXiv:2004.08955) of mmpretrain and mmdet, with their key names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import NormSpec, make_norm
from service.backbones.resnet import (
    BOTTLENECK_DEPTHS,
    Groups,
    Place,
    ResNet,
    ResNetSpec,
    bottleneck_strides,
    conv1x1,
    conv3x3,
    family,
)
from service.backbones.resnet_variants import (
    RESNEST_NAMES,
    DetectionGroupKeys,
    GroupKeys,
    PretrainGroupKeys,
)


@dataclass(frozen=True)
class SplitSpec:
    """How a bottleneck's 3x3 attends to its `radix` splits; `pool_stride`: an average pool strides after it."""

    radix: int
    reduction: int
    pool_stride: bool

    def squeezed(self, channels: int) -> int:
        """Channels of the attention's hidden layer."""
        return max(channels * self.radix // self.reduction, 32)


class AttentionConv2d(nn.Conv2d):
    """A convolution of the attention, which is plain whatever `conv_cfg` says."""


class SplitAttention(nn.Module):
    """A grouped 3x3 of `radix` splits, summed with weights that their means say; keys as in both libraries."""

    def __init__(
        self, split: SplitSpec, channels: int, norm: NormSpec, *, stride: int, dilation: int, groups: int
    ) -> None:
        super().__init__()
        self.radix, self.groups, self.norm_kind = split.radix, groups, norm.kind
        squeezed, wide = split.squeezed(channels), channels * split.radix
        self.conv = conv3x3(channels, wide, stride=stride, dilation=dilation, groups=groups * split.radix)
        self.add_module(f"{norm.kind}0", make_norm(norm, wide))
        self.fc1 = AttentionConv2d(channels, squeezed, 1, groups=groups)
        self.add_module(f"{norm.kind}1", make_norm(norm, squeezed))
        self.fc2 = AttentionConv2d(squeezed, wide, 1, groups=groups)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to [n, c, h / stride, w / stride]."""
        maps = torch.relu_(getattr(self, f"{self.norm_kind}0")(self.conv(maps)))
        count, _, height, width = maps.shape
        splits = maps.reshape(count, self.radix, -1, height, width)
        means = splits.sum(dim=1).mean((2, 3), keepdim=True)
        hidden = torch.relu_(getattr(self, f"{self.norm_kind}1")(self.fc1(means)))
        return (splits * self._attention(self.fc2(hidden))).sum(dim=1)

    def _attention(self, scores: Tensor) -> Tensor:
        """[n, c * radix, 1, 1] to weights [n, radix, c, 1, 1]."""
        if self.radix == 1:
            return torch.sigmoid(scores).unsqueeze(1)
        # fc2 is grouped, so that its channels are (groups, radix, c / groups).
        by_group = scores.reshape(scores.shape[0], self.groups, self.radix, -1, 1, 1).transpose(1, 2)
        return by_group.softmax(dim=1).flatten(2, 3)


class ResNeStBlock(nn.Module):
    """A bottleneck with split attention in place of its 3x3."""

    def __init__(
        self, spec: ResNetSpec, split: SplitSpec, place: Place, downsample: nn.Module | None
    ) -> None:
        super().__init__()
        stage, norm, self.norm_kind = place.stage, spec.norm, spec.norm.kind
        first, second = bottleneck_strides(spec, place)
        inner, outputs = spec.inner[stage], spec.widths[stage]
        pools = split.pool_stride and second > 1
        self.conv1 = conv1x1(place.inputs, inner, stride=first)
        self.add_module(f"{norm.kind}1", make_norm(norm, inner))
        self.conv2 = SplitAttention(
            split,
            inner,
            norm,
            stride=1 if pools else second,
            dilation=spec.dilations[stage],
            groups=spec.groups[stage],
        )
        self.pool = nn.AvgPool2d(3, stride=second, padding=1) if pools else nn.Identity()
        self.conv3 = conv1x1(inner, outputs)
        self.add_module(f"{norm.kind}3", make_norm(norm, outputs))
        self.downsample = downsample

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        shortcut = maps if self.downsample is None else self.downsample(maps)
        inner = torch.relu_(getattr(self, f"{self.norm_kind}1")(self.conv1(maps)))
        inner = self.pool(self.conv2(inner))
        return torch.relu_(getattr(self, f"{self.norm_kind}3")(self.conv3(inner)) + shortcut)


class ResNeSt(ResNet):
    """A ResNetV1d with split attention."""

    def __init__(self, spec: ResNetSpec, split: SplitSpec) -> None:
        self.split = split
        super().__init__(spec)

    def block(self, place: Place, downsample: nn.Module | None) -> nn.Module:
        """One residual block."""
        return ResNeStBlock(self.spec, self.split, place, downsample)


class ResNeStKeys(GroupKeys):
    """What ResNeSt takes in either library."""

    groups: Groups = Field(1, description="Groups of a bottleneck's 3x3, each of `radix` splits.")
    radix: Annotated[int, Field(strict=True, ge=1, le=16)] = Field(2, description="Splits of a group.")
    reduction_factor: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        4, description="Channels of the splits over those of the attention's hidden layer."
    )
    avg_down_stride: bool = Field(True, description="An average pool strides instead of the 3x3.")
    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True

    def split(self) -> SplitSpec:
        """How a bottleneck's 3x3 attends to its splits."""
        return SplitSpec(self.radix, self.reduction_factor, self.avg_down_stride)

    def network(self) -> ResNet:
        """The network of these keys, without its weights."""
        return ResNeSt(self.spec(), self.split())

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling."""
        return {**super().architecture(), "split": asdict(self.split())}

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all residual networks, and what groups and splits do not divide."""
        yield from super().faults()
        norm_groups = self.norm_cfg.num_groups or 1
        for width in self.spec().inner:
            squeezed = self.split().squeezed(width)
            if width % (self.groups * self.radix):
                yield "groups", f"{self.groups} groups of {self.radix} splits do not divide {width} channels"
            if squeezed % self.groups:
                yield "groups", f"{self.groups} groups do not divide {squeezed} channels"
            if squeezed % norm_groups:
                yield "norm_cfg/num_groups", f"{norm_groups} groups do not divide {squeezed} channels"


class PretrainResNeStKeys(ResNeStKeys, PretrainGroupKeys):
    """`mmpretrain.ResNeSt`."""

    TYPE: ClassVar[str] = "mmpretrain.ResNeSt"

    depth: Literal[50, 101, 152, 200, 269] = Field(description="Number of layers.")


class DetectionResNeStKeys(DetectionGroupKeys, ResNeStKeys):
    """`mmdet.ResNeSt`."""

    TYPE: ClassVar[str] = "mmdet.ResNeSt"

    depth: Literal[50, 101, 152, 200] = Field(description="Number of layers.")
    deep_stem: Literal[True] = True
    avg_down: Literal[True] = True


RESNEST = family(PretrainResNeStKeys, naming=RESNEST_NAMES, choices=(*BOTTLENECK_DEPTHS, 200, 269))
MMDET_RESNEST = family(
    DetectionResNeStKeys, naming=RESNEST_NAMES, library="mmdet", choices=(*BOTTLENECK_DEPTHS, 200)
)
