"""PP-YOLOE's neck (arXiv:2203.16250) as mmyolo has it, in its training form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig
from service.backbones.yolo import Bottleneck, ConvStyle, pyramid
from service.backbones.yolov6 import BlockSpec
from service.necks.openmmlab import make_neck_family
from service.necks.yolo import FactoredConfig, Levels, PathAggregation

KERNELS = (5, 9, 13)


@dataclass(frozen=True)
class PPYOLOESpec:
    """What decides the network.

    `layers` a stage, each with `blocks`; `shortcut` goes around each block, `alpha` weighs its 1x1 branch;
    `pooled`: max-pools between the blocks of the deepest level's first stage.
    """

    widths: tuple[int, ...]
    outs: tuple[int, ...]
    style: ConvStyle
    layers: int
    blocks: int
    shortcut: bool
    alpha: bool
    pooled: bool

    def block(self, width: int) -> Bottleneck:
        """mmyolo's `PPYOLOEBasicBlock`: a 3x3 convolution and a branched one."""
        branched = BlockSpec(self.style, identity=False, alpha=self.alpha).make(width, width)
        return Bottleneck(self.style.conv(width, width, 3), branched, identity=self.shortcut)

    def stage(self, inputs: int, outputs: int, *, pooled: bool = False) -> nn.Sequential:
        """Layers after each other."""
        widths = [inputs, *[outputs] * self.layers]
        return nn.Sequential(
            *(Layer(self, before, after, pooled=pooled) for before, after in pairwise(widths))
        )


class Pooling(nn.Module):
    """Maps beside their max-pools; key `conv2`."""

    def __init__(self, style: ConvStyle, width: int) -> None:
        super().__init__()
        self.conv2 = style.conv(width * (len(KERNELS) + 1), width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv2(pyramid(maps, KERNELS))
        return found


class Layer(nn.Module):
    """mmyolo's `CSPLayer` of this neck: blocks on one half of the channels, the other half beside them."""

    def __init__(self, spec: PPYOLOESpec, inputs: int, outputs: int, *, pooled: bool) -> None:
        super().__init__()
        half = outputs // 2
        self.conv1 = spec.style.conv(inputs, half)
        self.conv2 = spec.style.conv(inputs, half)
        self.blocks = nn.Sequential()
        for place in range(spec.blocks):
            self.blocks.add_module(str(place), spec.block(half))
            if pooled and place == (spec.blocks - 1) // 2:
                self.blocks.add_module("spp", Pooling(spec.style, half))
        self.conv3 = spec.style.conv(2 * half, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        halves = torch.cat((self.conv1(maps), self.blocks(self.conv2(maps))), 1)
        found: Tensor = self.conv3(halves)
        return found


class PPYOLOENeck(PathAggregation):
    """PP-YOLOE's neck with mmyolo's keys."""

    def __init__(self, spec: PPYOLOESpec) -> None:
        self.spec = spec
        super().__init__(len(spec.widths))

    def reduce(self, level: int) -> nn.Module:
        """A stage for the deepest level."""
        spec = self.spec
        if level < len(spec.widths) - 1:
            return nn.Identity()
        return spec.stage(spec.widths[level], spec.outs[level], pooled=spec.pooled)

    def upsample(self, level: int) -> nn.Module:
        """A convolution to half the width, and nearest pixels."""
        width = self.spec.outs[level]
        return nn.Sequential(self.spec.style.conv(width, width // 2), nn.Upsample(scale_factor=2))

    def top_down(self, level: int) -> nn.Module:
        """A stage."""
        spec, below = self.spec, level - 1
        return spec.stage(spec.widths[below] + spec.outs[level] // 2, spec.outs[below])

    def downsample(self, level: int) -> nn.Module:
        """A 3x3 convolution."""
        width = self.spec.outs[level]
        return self.spec.style.conv(width, width, 3, stride=2)

    def bottom_up(self, level: int) -> nn.Module:
        """A stage."""
        width, above = self.spec.outs[level : level + 2]
        return self.spec.stage(above + width, above)


# --- mmyolo.PPYOLOECSPPAFPN -----------------------------------------------------------------------


class BlockConfig(BaseModel):
    """`block_cfg`; norm and activation are those of the neck."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["PPYOLOEBasicBlock"]
    shortcut: bool = True
    use_alpha: bool = Field(False, description="A weight of the 1x1 branch.")


Layers = Annotated[int, Field(strict=True, ge=1, le=4)]
Count = Annotated[int, Field(strict=True, ge=1, le=16)]


class PPYOLOEConfig(FactoredConfig):
    """`mmyolo.PPYOLOECSPPAFPN`."""

    NETWORK: ClassVar[str] = "PPYOLOENeck"

    in_channels: Levels = Field(
        (256, 512, 1024), description="Channels of the backbone's levels, before widen_factor."
    )
    out_channels: Levels = Field(
        (256, 512, 1024), description="Channels of what comes out, before widen_factor."
    )
    num_csplayer: Layers = Field(1, description="Layers a stage.")
    num_blocks_per_layer: Count = 3
    block_cfg: BlockConfig = BlockConfig(type="PPYOLOEBasicBlock", shortcut=False)
    norm_cfg: NormConfig | None = Field(
        NormConfig(type="BN", momentum=0.1, eps=1e-5), description="null is none."
    )
    drop_block_cfg: Annotated[dict[str, Any], Field(max_length=16)] | None = Field(
        None, description="Matters in training only."
    )
    use_spp: bool = Field(False, description="Max-pools between the blocks of the deepest level.")

    def network(self) -> PPYOLOENeck:
        """The network of these keys, without its weights."""
        return PPYOLOENeck(self.spec())

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return tuple(self.widened(width) for width in self.out_channels)

    def spec(self) -> PPYOLOESpec:
        """The neutral spelling."""
        return PPYOLOESpec(
            self.takes(),
            self.gives(),
            self.style(),
            self.num_csplayer,
            round(self.num_blocks_per_layer * self.deepen_factor),
            self.block_cfg.shortcut,
            self.block_cfg.use_alpha,
            self.use_spp,
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and levels that do not pair."""
        if len(self.out_channels) != len(self.in_channels):
            yield "out_channels", f"has {len(self.out_channels)} entries for {len(self.in_channels)} levels"
        if self.act_cfg is None:
            yield "act_cfg", "null is not for branched convolutions"
        yield from super().faults()


PPYOLOE = make_neck_family(
    PPYOLOEConfig,
    PPYOLOENeck,
    example={"in_channels": [512, 1024, 2048], "out_channels": [192, 384, 768], "deepen_factor": 0.33},
)
