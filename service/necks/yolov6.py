"""YOLOv6's necks (arXiv:2209.02976) as mmyolo has them, in their training form: RepPAFPN and CSPRepPAFPN.

Those of version 3 (arXiv:2301.05586), RepBiPAFPN and CSPRepBiPAFPN, take one level more from below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.openmmlab import ActivationConfig
from service.backbones.yolo import PLAIN, SILU, ConvStyle, deepened
from service.backbones.yolov6 import (
    RELU,
    BlockConfig,
    BlockSpec,
    BlockStage,
    BranchedBlockConfig,
    PartialStage,
    unbiased_conv,
)
from service.necks.base import LevelFacts
from service.necks.openmmlab import Width, make_neck_family, norm_spec, numbered
from service.necks.yolo import Blocks, FactoredConfig, PathAggregation, Ratio, ThreeLevels


@dataclass(frozen=True)
class YOLOv6Spec:
    """What decides the network. `widths` are of what goes in, `outs` of what comes out.

    `hidden` are the channels of the blocks of CSPRepPAFPN's layers, empty for RepPAFPN; `layer_style` is that of
    the convolutions around them. `below` is the width of a level below the first one that comes out.
    """

    widths: tuple[int, ...]
    outs: tuple[int, ...]
    style: ConvStyle
    block: BlockSpec
    blocks: int
    hidden: tuple[int, ...] = ()
    layer_style: ConvStyle | None = None
    below: int | None = None

    def layer(self, inputs: int, level: int) -> nn.Module:
        """The blocks behind two levels beside each other; `level` says how wide it comes out."""
        outputs = self.outs[level]
        if self.layer_style is not None:
            style, hidden, pairs = self.layer_style, self.hidden[level], max(self.blocks // 2, 1)
            return PartialStage(style, self.block, outputs, hidden, pairs, inputs=inputs)
        more = [self.block.make(outputs, outputs) for _ in range(self.blocks - 1)]
        return BlockStage([self.block.make(inputs, outputs), *more])


class YOLOv6Neck(PathAggregation):
    """RepPAFPN or CSPRepPAFPN with mmyolo's keys."""

    def __init__(self, spec: YOLOv6Spec) -> None:
        self.spec = spec
        super().__init__(len(spec.widths))

    def reduce(self, level: int) -> nn.Module:
        """The deepest level to the width of the one below."""
        spec = self.spec
        if level < len(spec.widths) - 1:
            return nn.Identity()
        return spec.style.conv(spec.widths[level], spec.outs[level - 1])

    def upsample(self, level: int) -> nn.Module:
        """A transposed convolution."""
        width = self.spec.outs[level - 1]
        return nn.ConvTranspose2d(width, width, 2, stride=2)

    def top_down(self, level: int) -> nn.Module:
        """Blocks, and but for the last step a convolution to the width of the level below."""
        spec, below = self.spec, level - 1
        layer = spec.layer(self.top_down_inputs(below), below)
        if level == 1:
            return layer
        return nn.Sequential(layer, spec.style.conv(spec.outs[below], spec.outs[below - 1]))

    def top_down_inputs(self, level: int) -> int:
        """Channels of a level and the enlarged one beside each other."""
        return self.spec.outs[level] + self.spec.widths[level]

    def downsample(self, level: int) -> nn.Module:
        """A 3x3 convolution."""
        width = self.spec.outs[level]
        return self.spec.style.conv(width, width, 3, stride=2)

    def bottom_up(self, level: int) -> nn.Module:
        """Blocks."""
        return self.spec.layer(2 * self.spec.outs[level], level + 1)


class LevelFusion(nn.Module):
    """mmyolo's `BiFusion`: a level with the one above and the one below.

    Keys `conv1` to `conv3`, `upsample`, `downsample`.
    """

    def __init__(self, style: ConvStyle, inputs: int, below: int, width: int) -> None:
        super().__init__()
        self.conv1 = unbiased_conv(style, inputs, width)
        self.conv2 = unbiased_conv(style, below, width)
        self.conv3 = unbiased_conv(style, 3 * width, width)
        self.upsample = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.downsample = unbiased_conv(style, width, width, 3, stride=2)

    def forward(self, above: Tensor, level: Tensor, below: Tensor) -> Tensor:
        """[n, width, h / 2, w / 2], [n, inputs, h, w] and [n, below, 2h, 2w] to [n, width, h, w]."""
        parts = (self.upsample(above), self.conv1(level), self.downsample(self.conv2(below)))
        found: Tensor = self.conv3(torch.cat(parts, 1))
        return found


class YOLOv6BiNeck(YOLOv6Neck):
    """RepBiPAFPN or CSPRepBiPAFPN with mmyolo's keys: `upsample_layers` fuse three levels."""

    def upsample(self, level: int) -> nn.Module:
        """The level with the one below and the one below that."""
        spec, below = self.spec, level - 1
        lowest = spec.widths[below - 1] if below else spec.below
        if lowest is None:
            raise ValueError("a fusion of levels needs one below the first")
        return LevelFusion(spec.style, spec.widths[below], lowest, spec.outs[below])

    def top_down_inputs(self, level: int) -> int:
        """The fused levels are as wide as what comes out."""
        return self.spec.outs[level]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, halving, to [n, outputs_i, h_i, w_i] each but the first."""
        lowest, *levels = features
        reduced = [layer(maps) for layer, maps in zip(self.reduce_layers, levels, strict=True)]
        below = [lowest, *reduced[:-2]]
        inner = [reduced[-1]]
        fusions = zip(self.upsample_layers, self.top_down_layers, strict=True)
        for (fuse, layer), level, under in zip(fusions, reduced[-2::-1], below[::-1], strict=True):
            inner.insert(0, layer(fuse(inner[0], level, under)))
        return self.climbed(inner)


class RepPAFPNConfig(FactoredConfig):
    """`mmyolo.YOLOv6RepPAFPN`."""

    NETWORK: ClassVar[str] = "YOLOv6Neck"

    in_channels: ThreeLevels = Field(description="Channels of the backbone's levels, before widen_factor.")
    out_channels: ThreeLevels = Field(description="Channels of what comes out, before widen_factor.")
    num_csp_blocks: Blocks = 12
    act_cfg: ActivationConfig | None = Field(RELU, description="null is none.")
    block_cfg: BlockConfig = Field(
        BranchedBlockConfig(type="RepVGGBlock"), description="The block that layers are made of."
    )

    def network(self) -> YOLOv6Neck:
        """The network of these keys, without its weights."""
        return YOLOv6Neck(self.spec())

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return tuple(self.widened(width) for width in self.out_channels)

    def spec(self) -> YOLOv6Spec:
        """The neutral spelling."""
        return YOLOv6Spec(
            self.takes(),
            self.gives(),
            self.style(),
            self.block_cfg.spec(),
            deepened(self.num_csp_blocks, self.deepen_factor),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what `block_cfg` must not say otherwise."""
        norm = self.block_cfg.norm_cfg
        if norm is not None and norm.type == "GN":
            yield "block_cfg/norm_cfg/type", "GN is not served in blocks"
        yield from super().faults()


class CSPRepPAFPNConfig(RepPAFPNConfig):
    """`mmyolo.YOLOv6CSPRepPAFPN`."""

    hidden_ratio: Ratio = Field(0.5, description="Channels of a layer's blocks over those of the layer.")
    block_act_cfg: ActivationConfig | None = Field(
        SILU, description="Of the 1x1 convolutions around a layer's blocks; null is none."
    )

    def spec(self) -> YOLOv6Spec:
        """The neutral spelling."""
        activation = PLAIN if self.block_act_cfg is None else self.block_act_cfg.spec()
        return YOLOv6Spec(
            self.takes(),
            self.gives(),
            self.style(),
            self.block_cfg.spec(),
            deepened(self.num_csp_blocks, self.deepen_factor),
            tuple(int(width * self.hidden_ratio) for width in self.gives()),
            ConvStyle(norm_spec(self.norm_cfg), activation),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As RepPAFPN's, and a layer without channels."""
        if min(int(width * self.hidden_ratio) for width in self.gives()) < 1:
            yield "hidden_ratio", f"{self.hidden_ratio} leaves a layer's blocks without channels"
        yield from super().faults()


FourLevels = Annotated[tuple[Width, ...], Field(min_length=4, max_length=4)]


class RepBiPAFPNConfig(RepPAFPNConfig):
    """`mmyolo.YOLOv6RepBiPAFPN`."""

    NETWORK: ClassVar[str] = "YOLOv6BiNeck"

    in_channels: FourLevels = Field(
        description="Channels of the backbone's levels, before widen_factor; what comes out is of the last three."
    )

    def network(self) -> YOLOv6Neck:
        """The network of these keys, without its weights."""
        return YOLOv6BiNeck(self.spec())

    def spec(self) -> YOLOv6Spec:
        """The neutral spelling."""
        below, *widths = self.takes()
        return replace(super().spec(), widths=tuple(widths), below=below)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in, but the first."""
        return numbered(self.gives(), [level.stride for level in levels[1:]])


class CSPRepBiPAFPNConfig(RepBiPAFPNConfig, CSPRepPAFPNConfig):
    """`mmyolo.YOLOv6CSPRepBiPAFPN`."""


EXAMPLE = {"in_channels": [512, 1024, 2048], "out_channels": [128, 256, 512], "deepen_factor": 0.33}
BI_EXAMPLE = {**EXAMPLE, "in_channels": [256, 512, 1024, 2048]}
REP_PAFPN = make_neck_family(RepPAFPNConfig, YOLOv6Neck, example=EXAMPLE)
CSP_REP_PAFPN = make_neck_family(CSPRepPAFPNConfig, YOLOv6Neck, example=EXAMPLE)
REP_BI_PAFPN = make_neck_family(RepBiPAFPNConfig, YOLOv6BiNeck, example=BI_EXAMPLE)
CSP_REP_BI_PAFPN = make_neck_family(CSPRepBiPAFPNConfig, YOLOv6BiNeck, example=BI_EXAMPLE)
