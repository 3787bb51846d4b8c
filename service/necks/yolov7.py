"""YOLOv7's neck (arXiv:2207.02696) as mmyolo has it, in its training form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig
from service.backbones.openmmlab import ActivationConfig
from service.backbones.yolo import ConvStyle, groups_divide, max_pool
from service.backbones.yolov6 import BlockSpec
from service.backbones.yolov7 import ELANLayer, PoolAndConv, SummedLayers, TinyLayer
from service.necks.openmmlab import PlainConvConfig, activation_spec, make_neck_family, norm_spec
from service.necks.yolo import FactoredConfig, Levels, PathAggregation, Ratio


@dataclass(frozen=True)
class LayerSpec:
    """The layers behind two levels beside each other.

    `hidden` and `width` are ratios to what goes in. `blocks` of `convs` convolutions; 0 is YOLOv7-tiny's layer.
    `summed` layers beside each other; 0 is one, not in a list.
    """

    hidden: float
    width: float = 0.0
    blocks: int = 0
    convs: int = 1
    summed: int = 0

    def make(self, style: ConvStyle, inputs: int, outputs: int) -> nn.Module:
        """One layer."""
        hidden = int(inputs * self.hidden)
        if not self.blocks:
            return TinyLayer(style, inputs, outputs, hidden)
        made = [
            ELANLayer(
                style,
                inputs,
                outputs,
                hidden,
                self.blocks,
                width=int(inputs * self.width),
                convs=self.convs,
            )
            for _ in range(max(self.summed, 1))
        ]
        return SummedLayers(made) if self.summed else made[0]


@dataclass(frozen=True)
class YOLOv7Spec:
    """What decides the network.

    `down` is how levels go up: by a convolution, or by a pool and a convolution whose middle is as wide as what
    goes in (`both_wide`) or as half of what comes out (`both`). `out` is what levels come out of.
    `layer_style` is that of the layers.
    """

    widths: tuple[int, ...]
    outs: tuple[int, ...]
    style: ConvStyle
    layer_style: ConvStyle
    layer: LayerSpec
    pyramid_ratio: float
    tiny: bool
    down: Literal["conv", "both", "both_wide"]
    out: Literal["none", "conv", "branched"]
    upsampled_first: bool = False


class PoolingPyramid(nn.Module):
    """mmyolo's `SPPFCSPBlock`: max-pools on one half, the other beside them.

    Keys `main_layers`, `fuse_layers`, `short_layer`, `final_conv`.
    """

    def __init__(self, spec: YOLOv7Spec, inputs: int, outputs: int) -> None:
        super().__init__()
        conv, hidden = spec.style.conv, int(2 * outputs * spec.pyramid_ratio)
        self.tiny = spec.tiny
        if spec.tiny:
            self.main_layers: nn.Module = conv(inputs, hidden)
            self.fuse_layers: nn.Module = conv(4 * hidden, hidden)
        else:
            self.main_layers = nn.Sequential(
                conv(inputs, hidden), conv(hidden, hidden, 3), conv(hidden, hidden)
            )
            self.fuse_layers = nn.Sequential(conv(4 * hidden, hidden), conv(hidden, hidden, 3))
        self.short_layer = conv(inputs, hidden)
        self.final_conv = conv(2 * hidden, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        pooled = [self.main_layers(maps)]
        for _ in range(3):
            pooled.append(max_pool(pooled[-1], 5))
        fused = self.fuse_layers(torch.cat(pooled[::-1] if self.tiny else pooled, 1))
        found: Tensor = self.final_conv(torch.cat((fused, self.short_layer(maps)), 1))
        return found


class YOLOv7Neck(PathAggregation):
    """YOLOv7's neck with mmyolo's keys."""

    def __init__(self, spec: YOLOv7Spec) -> None:
        self.spec = spec
        super().__init__(len(spec.widths), upsampled_first=spec.upsampled_first)

    def reduce(self, level: int) -> nn.Module:
        """A convolution; for the deepest level the pooling."""
        spec = self.spec
        if level == len(spec.widths) - 1:
            return PoolingPyramid(spec, spec.widths[level], spec.outs[level])
        return spec.style.conv(spec.widths[level], spec.outs[level])

    def upsample(self, level: int) -> nn.Module:
        """A convolution to the width of the level below, and nearest pixels."""
        spec = self.spec
        return nn.Sequential(
            spec.style.conv(spec.outs[level], spec.outs[level - 1]), nn.Upsample(scale_factor=2)
        )

    def top_down(self, level: int) -> nn.Module:
        """A layer."""
        spec, width = self.spec, self.spec.outs[level - 1]
        return spec.layer.make(spec.layer_style, 2 * width, width)

    def downsample(self, level: int) -> nn.Module:
        """To the width of the level above."""
        spec = self.spec
        inputs, outputs = spec.outs[level : level + 2]
        if spec.down == "conv":
            return spec.style.conv(inputs, outputs, 3, stride=2)
        return PoolAndConv(spec.style, inputs, outputs, inputs if spec.down == "both_wide" else outputs // 2)

    def bottom_up(self, level: int) -> nn.Module:
        """A layer."""
        spec, width = self.spec, self.spec.outs[level + 1]
        return spec.layer.make(spec.layer_style, 2 * width, width)

    def out(self, level: int) -> nn.Module:
        """A convolution to twice the width, or nothing."""
        spec, width = self.spec, self.spec.outs[level]
        if spec.out == "none":
            return nn.Identity()
        if spec.out == "branched":
            return BlockSpec(spec.style).make(width, 2 * width)
        return spec.style.conv(width, 2 * width, 3)


# --- mmyolo.YOLOv7PAFPN ---------------------------------------------------------------------------

Count = Annotated[int, Field(strict=True, ge=1, le=8)]


class _LayerConfig(BaseModel):
    """What all layers take; without these keys they are normed and activated as the neck is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    conv_cfg: PlainConvConfig | None = None
    norm_cfg: NormConfig | None = Field(None, description="The neck's where not given; null is none.")
    act_cfg: ActivationConfig | None = Field(None, description="The neck's where not given; null is none.")

    def style(self, neck: ConvStyle) -> ConvStyle:
        """How the layer's convolutions are normed and activated."""
        norm = norm_spec(self.norm_cfg) if "norm_cfg" in self.model_fields_set else neck.norm
        given = activation_spec(self.act_cfg) if "act_cfg" in self.model_fields_set else neck.activation
        return ConvStyle(norm, given)


class TinyLayerConfig(_LayerConfig):
    """`block_cfg=dict(type='TinyDownSampleBlock')`."""

    type: Literal["TinyDownSampleBlock"]
    middle_ratio: Ratio = 1.0
    kernel_sizes: Literal[3] = 3

    def spec(self) -> LayerSpec:
        """The neutral spelling."""
        return LayerSpec(self.middle_ratio)


class ELANConfig(_LayerConfig):
    """`block_cfg=dict(type='ELANBlock')`."""

    type: Literal["ELANBlock"]
    middle_ratio: Ratio
    block_ratio: Ratio
    num_blocks: Count = 2
    num_convs_in_block: Count = 1

    def spec(self) -> LayerSpec:
        """The neutral spelling."""
        return LayerSpec(self.middle_ratio, self.block_ratio, self.num_blocks, self.num_convs_in_block)


class SummedELANConfig(_LayerConfig):
    """`block_cfg=dict(type='EELANBlock')`."""

    type: Literal["EELANBlock"]
    num_elan_block: Count
    middle_ratio: Ratio
    block_ratio: Ratio
    num_blocks: Count = 2
    num_convs_in_block: Count = 1

    def spec(self) -> LayerSpec:
        """The neutral spelling."""
        return LayerSpec(
            self.middle_ratio,
            self.block_ratio,
            self.num_blocks,
            self.num_convs_in_block,
            self.num_elan_block,
        )


LayerConfig = Annotated[TinyLayerConfig | ELANConfig | SummedELANConfig, Field(discriminator="type")]
ELAN = ELANConfig(type="ELANBlock", middle_ratio=0.5, block_ratio=0.25, num_blocks=4, num_convs_in_block=1)
P6_LEVELS = 4


class YOLOv7Config(FactoredConfig):
    """`mmyolo.YOLOv7PAFPN`."""

    NETWORK: ClassVar[str] = "YOLOv7Neck"

    out_channels: Levels = Field(
        description="Before widen_factor; levels come out twice as wide, but for a neck of four levels."
    )
    block_cfg: LayerConfig = Field(ELAN, description="The layers behind two levels beside each other.")
    spp_expand_ratio: Ratio = 0.5
    is_tiny_version: bool = Field(False, description="A narrower pooling; levels go up by a convolution.")
    use_maxpool_in_downsample: bool = Field(True, description="Levels go up by a pool beside a convolution.")
    use_in_channels_in_downsample: bool = Field(
        False, description="The convolution beside the pool is as wide inside as what goes in."
    )
    use_repconv_outs: bool = Field(True, description="Levels come out of branched convolutions.")
    upsample_feats_cat_first: bool = Field(False, description="The level from above before the one it meets.")

    def network(self) -> YOLOv7Neck:
        """The network of these keys, without its weights."""
        return YOLOv7Neck(self.spec())

    def outs(self) -> tuple[int, ...]:
        """Channels inside of the neck."""
        return tuple(self.widened(width) for width in self.out_channels)

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        factor = 1 if len(self.in_channels) == P6_LEVELS else 2
        return tuple(factor * width for width in self.outs())

    def spec(self) -> YOLOv7Spec:
        """The neutral spelling."""
        both: Literal["both", "both_wide"] = "both_wide" if self.use_in_channels_in_downsample else "both"
        last: Literal["conv", "branched"] = "branched" if self.use_repconv_outs else "conv"
        return YOLOv7Spec(
            self.takes(),
            self.outs(),
            self.style(),
            self.block_cfg.style(self.style()),
            self.block_cfg.spec(),
            self.spp_expand_ratio,
            self.is_tiny_version,
            both if self.use_maxpool_in_downsample and not self.is_tiny_version else "conv",
            "none" if len(self.in_channels) == P6_LEVELS else last,
            self.upsample_feats_cat_first,
        )

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and levels that do not pair."""
        if len(self.out_channels) != len(self.in_channels):
            yield "out_channels", f"has {len(self.out_channels)} entries for {len(self.in_channels)} levels"
        narrowest, layer = 2 * min(self.outs()), self.block_cfg.spec()
        if narrowest < 2 or int(narrowest * layer.hidden) < 1:
            yield "block_cfg/middle_ratio", "leaves a layer without channels"
        if layer.blocks and int(narrowest * layer.width) < 1:
            yield "block_cfg/block_ratio", "leaves a layer's blocks without channels"
        if int(2 * self.outs()[-1] * self.spp_expand_ratio) < 1:
            yield "spp_expand_ratio", "leaves the pooling without channels"
        if self.act_cfg is None and self.spec().out == "branched":
            yield "act_cfg", "null is not for branched convolutions; set use_repconv_outs to false"
        norm = self.block_cfg.norm_cfg
        if norm is not None and (fault := norm.fault()) is not None:
            yield "block_cfg/norm_cfg/num_groups", fault
        elif norm is not None and norm.type == "GN" and not groups_divide(self.network):
            yield "block_cfg/norm_cfg/num_groups", f"{norm.num_groups} groups do not divide every width"
        yield from super().faults()


YOLOV7 = make_neck_family(
    YOLOv7Config,
    YOLOv7Neck,
    example={"in_channels": [512, 1024, 2048], "out_channels": [128, 256, 512]},
)
