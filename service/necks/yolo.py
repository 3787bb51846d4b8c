"""What mmyolo's necks share, and those of cross-stage partial layers: YOLOv5, YOLOv8, YOLOX, CSPNeXt (RTMDet).

They are path aggregation networks (Liu et al., arXiv:1803.01534). mmdet's YOLOX and CSPNeXt necks are the same
networks by other key names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.csp_darknet import SplitLayer
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import ActivationConfig
from service.backbones.yolo import (
    PLAIN,
    SILU,
    YOLO_NORM,
    ConvStyle,
    CSPLayer,
    cspnext_block,
    darknet_block,
    deepened,
    groups_divide,
    rounded_up,
)
from service.necks.base import LevelFacts, Neck, require_maps
from service.necks.fpn import UpsampleConfig, UpsampleSpec
from service.necks.openmmlab import (
    OpenMMLabNeckConfig,
    Width,
    make_neck_family,
    norm_spec,
    numbered,
    require_widths,
)

# --- networks -------------------------------------------------------------------------------------


class PathAggregation(Neck):
    """Down from the deepest level and back up, with mmyolo's keys.

    `reduce_layers.{i}`, `upsample_layers.{j}`, `top_down_layers.{j}`, `downsample_layers.{i}`,
    `bottom_up_layers.{i}`, `out_layers.{i}`: i counts levels from the shallowest, j steps down from the deepest.
    """

    def __init__(self, levels: int, *, upsampled_first: bool = True) -> None:
        super().__init__()
        self.upsampled_first = upsampled_first
        down = range(levels - 1, 0, -1)
        self.reduce_layers = nn.ModuleList(self.reduce(level) for level in range(levels))
        self.upsample_layers = nn.ModuleList(self.upsample(level) for level in down)
        self.top_down_layers = nn.ModuleList(self.top_down(level) for level in down)
        self.downsample_layers = nn.ModuleList(self.downsample(level) for level in range(levels - 1))
        self.bottom_up_layers = nn.ModuleList(self.bottom_up(level) for level in range(levels - 1))
        self.out_layers = nn.ModuleList(self.out(level) for level in range(levels))

    @abstractmethod
    def reduce(self, level: int) -> nn.Module:
        """What level `level` passes first."""

    @abstractmethod
    def upsample(self, level: int) -> nn.Module:
        """What brings level `level` to the size of the one below."""

    @abstractmethod
    def top_down(self, level: int) -> nn.Module:
        """What level `level` and the one below, beside each other, pass."""

    @abstractmethod
    def downsample(self, level: int) -> nn.Module:
        """What brings level `level` to the size of the one above."""

    @abstractmethod
    def bottom_up(self, level: int) -> nn.Module:
        """What level `level` and the one above, beside each other, pass."""

    def out(self, level: int) -> nn.Module:  # noqa: ARG002 - most have none
        """What level `level` passes last."""
        return nn.Identity()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, halving, to [n, outputs_i, h_i, w_i] each."""
        reduced = [layer(maps) for layer, maps in zip(self.reduce_layers, features, strict=True)]
        inner = [reduced[-1]]
        steps = zip(self.upsample_layers, self.top_down_layers, reversed(reduced[:-1]), strict=True)
        for upsample, layer, below in steps:
            pair = (upsample(inner[0]), below)
            inner.insert(0, layer(torch.cat(pair if self.upsampled_first else pair[::-1], 1)))
        return self.climbed(inner)

    def climbed(self, inner: Sequence[Tensor]) -> list[Tensor]:
        """What comes out of the levels on the way down, from the shallowest up."""
        levels = [inner[0]]
        for downsample, layer, above in zip(
            self.downsample_layers, self.bottom_up_layers, inner[1:], strict=True
        ):
            levels.append(layer(torch.cat((downsample(levels[-1]), above), 1)))
        return [layer(maps) for layer, maps in zip(self.out_layers, levels, strict=True)]


TWICE = UpsampleSpec(factor=2)


@dataclass(frozen=True)
class CSPPyramidSpec:
    """What decides the network.

    `ratio` is that of a layer's hidden channels; `separable` says of which of the pyramid's own convolutions and
    of the blocks in its layers the 3x3 are separable. `out` is the width of what comes out of a convolution of
    `out_kernel`; None where levels come out as they are.
    """

    widths: tuple[int, ...]
    style: ConvStyle
    blocks: int
    kind: Literal["darknet", "cspnext"] = "darknet"
    ratio: float = 0.5
    separable: tuple[bool, bool] = (False, False)
    out: int | None = None
    out_kernel: int = 1
    upsample: UpsampleSpec = TWICE

    def layer(self, inputs: int, width: int) -> CSPLayer:
        """A cross-stage partial layer without shortcuts."""
        hidden = int(width * self.ratio)
        block = darknet_block if self.kind == "darknet" else cspnext_block
        blocks = [
            block(self.style, hidden, identity=False, separable=self.separable[1]) for _ in range(self.blocks)
        ]
        return CSPLayer(self.style, width, hidden, blocks, inputs=inputs)

    def down(self, level: int) -> nn.Module:
        """A 3x3 convolution of stride 2."""
        make = self.style.separable if self.separable[0] else self.style.conv
        return make(self.widths[level], self.widths[level], 3, stride=2)

    def narrow(self, level: int) -> nn.Module:
        """A 1x1 convolution to the channels of the level below."""
        make = self.style.separable if self._all_separable() else self.style.conv
        return make(self.widths[level], self.widths[level - 1], 1)

    def last(self, level: int) -> nn.Module:
        """What comes out of a level."""
        if self.out is None:
            return nn.Identity()
        make = self.style.separable if self._all_separable() else self.style.conv
        return make(self.widths[level], self.out, self.out_kernel)

    def _all_separable(self) -> bool:
        # YOLOX keeps its 1x1 convolutions plain; mmyolo's CSPNeXt has one kind for all.
        return self.kind == "cspnext" and self.separable[0]


class CSPPyramid(PathAggregation):
    """YOLOv5's, YOLOX's and CSPNeXt's neck with mmyolo's keys."""

    def __init__(self, spec: CSPPyramidSpec) -> None:
        self.spec = spec
        self._levels = len(spec.widths)
        super().__init__(self._levels)

    def reduce(self, level: int) -> nn.Module:
        """The deepest level to the channels of the one below."""
        return self.spec.narrow(level) if level == self._levels - 1 else nn.Identity()

    def upsample(self, level: int) -> nn.Module:  # noqa: ARG002 - each the same
        """Pixels alone."""
        spec = self.spec.upsample
        return nn.Upsample(scale_factor=spec.factor, mode=spec.mode, align_corners=spec.align_corners)

    def top_down(self, level: int) -> nn.Module:
        """A layer, and but for the last step a convolution to the channels of the level below."""
        below = self.spec.widths[level - 1]
        layer = self.spec.layer(2 * below, below)
        return layer if level == 1 else nn.Sequential(layer, self.spec.narrow(level - 1))

    def downsample(self, level: int) -> nn.Module:
        """A 3x3 convolution."""
        return self.spec.down(level)

    def bottom_up(self, level: int) -> nn.Module:
        """A layer."""
        return self.spec.layer(2 * self.spec.widths[level], self.spec.widths[level + 1])

    def out(self, level: int) -> nn.Module:
        """A convolution to one width for all levels, or nothing."""
        return self.spec.last(level)


class DetectionCSPPyramid(Neck):
    """The same with mmdet's keys.

    `reduce_layers.{j}`, `top_down_blocks.{j}`, `downsamples.{i}`, `bottom_up_blocks.{i}`, `out_convs.{i}`.
    """

    def __init__(self, spec: CSPPyramidSpec) -> None:
        super().__init__()
        self.upsample = spec.upsample
        widths, levels = spec.widths, len(spec.widths)
        down = range(levels - 1, 0, -1)
        conv = spec.style.conv
        self.reduce_layers = nn.ModuleList(conv(widths[level], widths[level - 1]) for level in down)
        self.top_down_blocks = nn.ModuleList(
            spec.layer(2 * widths[level - 1], widths[level - 1]) for level in down
        )
        self.downsamples = nn.ModuleList(spec.down(level) for level in range(levels - 1))
        self.bottom_up_blocks = nn.ModuleList(
            spec.layer(2 * widths[level], widths[level + 1]) for level in range(levels - 1)
        )
        self.out_convs = nn.ModuleList(spec.last(level) for level in range(levels))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, halving, to [n, out, h_i, w_i] each."""
        inner = [features[-1]]
        steps = zip(self.reduce_layers, self.top_down_blocks, reversed(features[:-1]), strict=True)
        for reduce, block, below in steps:
            inner[0] = reduce(inner[0])
            enlarged = self.upsample.apply(inner[0], below)
            inner.insert(0, block(torch.cat((enlarged, below), 1)))
        levels = [inner[0]]
        for down, block, above in zip(self.downsamples, self.bottom_up_blocks, inner[1:], strict=True):
            levels.append(block(torch.cat((down(levels[-1]), above), 1)))
        return [conv(maps) for conv, maps in zip(self.out_convs, levels, strict=True)]


@dataclass(frozen=True)
class SplitPyramidSpec:
    """What decides YOLOv8's neck."""

    widths: tuple[int, ...]
    style: ConvStyle
    blocks: int


class SplitPyramid(PathAggregation):
    """YOLOv8's neck with mmyolo's keys: nothing is reduced, and every block's maps go on."""

    def __init__(self, spec: SplitPyramidSpec) -> None:
        self.spec = spec
        super().__init__(len(spec.widths))

    def _layer(self, level: int, beside: int) -> SplitLayer:
        spec, width = self.spec, self.spec.widths[level]
        inputs = width + spec.widths[beside]
        return SplitLayer(spec.style, width, spec.blocks, identity=False, inputs=inputs)

    def reduce(self, level: int) -> nn.Module:  # noqa: ARG002 - nothing
        """Nothing."""
        return nn.Identity()

    def upsample(self, level: int) -> nn.Module:  # noqa: ARG002 - each the same
        """Nearest pixels."""
        return nn.Upsample(scale_factor=2)

    def top_down(self, level: int) -> nn.Module:
        """A layer."""
        return self._layer(level - 1, level)

    def downsample(self, level: int) -> nn.Module:
        """A 3x3 convolution."""
        width = self.spec.widths[level]
        return self.spec.style.conv(width, width, 3, stride=2)

    def bottom_up(self, level: int) -> nn.Module:
        """A layer."""
        return self._layer(level + 1, level)


# --- spellings ------------------------------------------------------------------------------------

Blocks = Annotated[int, Field(strict=True, ge=1, le=32)]
Levels = Annotated[tuple[Width, ...], Field(min_length=2, max_length=6)]
ThreeLevels = Annotated[tuple[Width, ...], Field(min_length=3, max_length=3)]
Ratio = Annotated[float, Field(ge=0.05, le=4)]


class TwiceConfig(UpsampleConfig):
    """`upsample_cfg`: twice the size."""

    scale_factor: Literal[2] = 2


class YoloNeckConfig(OpenMMLabNeckConfig):
    """The keys that these necks have in common."""

    in_channels: Levels = Field(description="Channels of every level that the backbone gives.")
    norm_cfg: NormConfig | None = Field(YOLO_NORM, description="null is none.")
    act_cfg: ActivationConfig | None = Field(SILU, description="null is none.")

    def style(self) -> ConvStyle:
        """How convolutions are normed and activated."""
        return ConvStyle(norm_spec(self.norm_cfg), PLAIN if self.act_cfg is None else self.act_cfg.spec())

    @abstractmethod
    def network(self) -> Neck:
        """The network of these keys, without its weights."""

    @abstractmethod
    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in."""
        return numbered(self.gives(), [level.stride for level in levels])

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if min(*self.takes(), *self.gives()) < 2:
            yield "in_channels", "leaves a layer without channels"
        if self.norm_cfg is None:
            return
        if (fault := self.norm_cfg.fault()) is not None:
            yield "norm_cfg/num_groups", fault
        elif self.norm_cfg.type == "GN" and not groups_divide(self.network):
            yield "norm_cfg/num_groups", f"{self.norm_cfg.num_groups} groups do not divide every width"


class FactoredConfig(YoloNeckConfig):
    """What mmyolo's necks take besides. `in_channels` are written before `widen_factor`."""

    in_channels: Levels = Field(description="Channels of the backbone's levels, before widen_factor.")
    deepen_factor: Annotated[float, Field(gt=0, le=4)] = Field(
        1.0, description="Multiplies the numbers of blocks."
    )
    widen_factor: Ratio = Field(1.0, description="Multiplies the channels, those that go in and come out.")
    freeze_all: bool = Field(False, description="Matters in training only.")

    def widened(self, width: int) -> int:
        """Channels after `widen_factor`."""
        return int(width * self.widen_factor)

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return tuple(self.widened(width) for width in self.in_channels)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not maps of the widened channels."""
        require_maps(levels, self.type)
        require_widths(self.takes(), levels, written=self.in_channels)


class YOLOv5Config(FactoredConfig):
    """`mmyolo.YOLOv5PAFPN`."""

    NETWORK: ClassVar[str] = "CSPPyramid"

    out_channels: Width | Levels = Field(
        description="mmyolo does not use it: what comes out is as wide as what goes in."
    )
    num_csp_blocks: Blocks = 1

    def widened(self, width: int) -> int:
        """Channels after `widen_factor`: a multiple of 8."""
        return rounded_up(width, self.widen_factor)

    def network(self) -> CSPPyramid:
        """The network of these keys, without its weights."""
        return CSPPyramid(self.spec())

    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""
        blocks = deepened(self.num_csp_blocks, self.deepen_factor)
        return CSPPyramidSpec(self.takes(), self.style(), blocks)

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return self.takes()


class YOLOv8Config(FactoredConfig):
    """`mmyolo.YOLOv8PAFPN`."""

    NETWORK: ClassVar[str] = "SplitPyramid"

    out_channels: Levels = Field(description="Must be in_channels.")
    num_csp_blocks: Blocks = 3

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what comes out is as wide as what goes in."""
        if self.out_channels != self.in_channels:
            yield "out_channels", f"must be in_channels, which are {list(self.in_channels)}"
        yield from super().faults()

    def widened(self, width: int) -> int:
        """Channels after `widen_factor`: a multiple of 8."""
        return rounded_up(width, self.widen_factor)

    def network(self) -> SplitPyramid:
        """The network of these keys, without its weights."""
        return SplitPyramid(self.spec())

    def spec(self) -> SplitPyramidSpec:
        """The neutral spelling."""
        blocks = deepened(self.num_csp_blocks, self.deepen_factor)
        return SplitPyramidSpec(self.takes(), self.style(), blocks)

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return self.takes()


class YOLOXConfig(FactoredConfig):
    """`mmyolo.YOLOXPAFPN`."""

    NETWORK: ClassVar[str] = "CSPPyramid"

    in_channels: ThreeLevels = Field(description="Channels of the backbone's levels, before widen_factor.")
    out_channels: Width = Field(description="Channels of every level that comes out, before widen_factor.")
    num_csp_blocks: Blocks = 3
    use_depthwise: bool = Field(False, description="Separable 3x3 convolutions between the layers.")

    def network(self) -> CSPPyramid:
        """The network of these keys, without its weights."""
        return CSPPyramid(self.spec())

    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""
        return CSPPyramidSpec(
            self.takes(),
            self.style(),
            round(self.num_csp_blocks * self.deepen_factor),
            separable=(self.use_depthwise, False),
            out=self.widened(self.out_channels),
        )

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return (self.widened(self.out_channels),) * len(self.in_channels)


class CSPNeXtConfig(FactoredConfig):
    """`mmyolo.CSPNeXtPAFPN`."""

    NETWORK: ClassVar[str] = "CSPPyramid"

    out_channels: Width = Field(description="Channels of every level that comes out, before widen_factor.")
    num_csp_blocks: Blocks = 3
    use_depthwise: bool = Field(False, description="Separable convolutions outside of the layers.")
    expand_ratio: Ratio = Field(0.5, description="Channels of a layer's blocks over those of the layer.")
    upsample_cfg: TwiceConfig = TwiceConfig()
    norm_cfg: NormConfig | None = Field(NormConfig(type="BN"), description="null is none.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and an alignment of pixels that are not mixed."""
        yield from self.upsample_cfg.faults()
        yield from super().faults()

    def network(self) -> CSPPyramid:
        """The network of these keys, without its weights."""
        return CSPPyramid(self.spec())

    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""
        return CSPPyramidSpec(
            self.takes(),
            self.style(),
            round(self.num_csp_blocks * self.deepen_factor),
            kind="cspnext",
            ratio=self.expand_ratio,
            separable=(self.use_depthwise, False),
            out=self.widened(self.out_channels),
            out_kernel=3,
            upsample=self.upsample_cfg.spec(),
        )

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return (self.widened(self.out_channels),) * len(self.in_channels)


class DetectionConfig(YoloNeckConfig):
    """What mmdet's two have in common."""

    NETWORK: ClassVar[str] = "DetectionCSPPyramid"

    out_channels: Width = Field(description="Channels of every level that comes out.")
    num_csp_blocks: Blocks = 3
    use_depthwise: bool = Field(False, description="Separable 3x3 convolutions.")
    upsample_cfg: TwiceConfig = TwiceConfig()
    act_cfg: ActivationConfig | None = Field(ActivationConfig(type="Swish"), description="null is none.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and an alignment of pixels that are not mixed."""
        yield from self.upsample_cfg.faults()
        yield from super().faults()

    def network(self) -> DetectionCSPPyramid:
        """The network of these keys, without its weights."""
        return DetectionCSPPyramid(self.spec())

    @abstractmethod
    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def gives(self) -> tuple[int, ...]:
        """Channels of the levels that come out."""
        return (self.out_channels,) * len(self.in_channels)


class DetectionYOLOXConfig(DetectionConfig):
    """`mmdet.YOLOXPAFPN`."""

    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""
        return CSPPyramidSpec(
            self.in_channels,
            self.style(),
            self.num_csp_blocks,
            separable=(self.use_depthwise, self.use_depthwise),
            out=self.out_channels,
            upsample=self.upsample_cfg.spec(),
        )


class DetectionCSPNeXtConfig(DetectionConfig):
    """`mmdet.CSPNeXtPAFPN`."""

    expand_ratio: Ratio = Field(0.5, description="Channels of a layer's blocks over those of the layer.")

    def spec(self) -> CSPPyramidSpec:
        """The neutral spelling."""
        return CSPPyramidSpec(
            self.in_channels,
            self.style(),
            self.num_csp_blocks,
            kind="cspnext",
            ratio=self.expand_ratio,
            separable=(self.use_depthwise, self.use_depthwise),
            out=self.out_channels,
            out_kernel=3,
            upsample=self.upsample_cfg.spec(),
        )


WIDE = [512, 1024, 2048]
ONE_WIDTH = {"in_channels": WIDE, "out_channels": 256}
EACH_WIDTH = {"in_channels": WIDE, "out_channels": WIDE}
YOLOV5 = make_neck_family(YOLOv5Config, CSPPyramid, example=EACH_WIDTH)
YOLOV8 = make_neck_family(YOLOv8Config, SplitPyramid, example=EACH_WIDTH)
YOLOX = make_neck_family(YOLOXConfig, CSPPyramid, example=ONE_WIDTH)
CSPNEXT = make_neck_family(CSPNeXtConfig, CSPPyramid, example=ONE_WIDTH)
DETECTION_YOLOX = make_neck_family(DetectionYOLOXConfig, DetectionCSPPyramid, example=ONE_WIDTH)
DETECTION_CSPNEXT = make_neck_family(DetectionCSPNeXtConfig, DetectionCSPPyramid, example=ONE_WIDTH)
