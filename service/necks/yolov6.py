"""YOLOv6's necks (arXiv:2209.02976) as mmyolo has them, in their training form: RepPAFPN and CSPRepPAFPN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field
from torch import nn

from service.backbones.openmmlab import ActivationConfig
from service.backbones.yolo import PLAIN, SILU, ConvStyle, deepened
from service.backbones.yolov6 import (
    RELU,
    BlockConfig,
    BlockSpec,
    BlockStage,
    BranchedBlockConfig,
    PartialStage,
)
from service.necks.openmmlab import make_neck_family
from service.necks.yolo import Blocks, FactoredConfig, PathAggregation, Ratio, ThreeLevels


@dataclass(frozen=True)
class YOLOv6Spec:
    """What decides the network. `widths` are of what goes in, `outs` of what comes out.

    `hidden` are the channels of the blocks of CSPRepPAFPN's layers, empty for RepPAFPN; `layer_style` is that of
    the convolutions around them.
    """

    widths: tuple[int, ...]
    outs: tuple[int, ...]
    style: ConvStyle
    block: BlockSpec
    blocks: int
    hidden: tuple[int, ...] = ()
    layer_style: ConvStyle | None = None

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
        layer = spec.layer(spec.outs[below] + spec.widths[below], below)
        if level == 1:
            return layer
        return nn.Sequential(layer, spec.style.conv(spec.outs[below], spec.outs[below - 1]))

    def downsample(self, level: int) -> nn.Module:
        """A 3x3 convolution."""
        width = self.spec.outs[level]
        return self.spec.style.conv(width, width, 3, stride=2)

    def bottom_up(self, level: int) -> nn.Module:
        """Blocks."""
        return self.spec.layer(2 * self.spec.outs[level], level + 1)


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
            ConvStyle(self.norm_cfg.spec(), activation),
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As RepPAFPN's, and a layer without channels."""
        if min(int(width * self.hidden_ratio) for width in self.gives()) < 1:
            yield "hidden_ratio", f"{self.hidden_ratio} leaves a layer's blocks without channels"
        yield from super().faults()


EXAMPLE = {"in_channels": [512, 1024, 2048], "out_channels": [128, 256, 512], "deepen_factor": 0.33}
REP_PAFPN = make_neck_family(RepPAFPNConfig, YOLOv6Neck, example=EXAMPLE)
CSP_REP_PAFPN = make_neck_family(CSPRepPAFPNConfig, YOLOv6Neck, example=EXAMPLE)
