"""What the YOLO backbones of mmyolo and mmdet share: layers, a stem with stages behind it, and their keys.

The key names are the libraries'. The layers are those of CSPDarknet (YOLOX, arXiv:2107.08430), CSPNeXt (RTMDet,
arXiv:2212.07784), YOLOv5 and YOLOv8; other families add their own.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Backbone, Indices, InputChannels
from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvModule,
    OpenMMLabConfig,
    frozen_by_stage,
    map_features,
)
from service.config.spec import FeatureInfo, Freeze, FreezeReport

PLAIN = ActivationSpec("none")


@dataclass(frozen=True)
class ConvStyle:
    """How the convolutions of a network are normed and activated."""

    norm: NormSpec | None
    activation: ActivationSpec

    def conv(self, inputs: int, outputs: int, kernel: int = 1, *, stride: int = 1) -> ConvModule:
        """A convolution that keeps the size of its maps, but for the stride."""
        return ConvModule(inputs, outputs, kernel, stride=stride, norm=self.norm, activation=self.activation)

    def separable(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1) -> SeparableConv:
        """A convolution of every channel by itself and a 1x1 over all of them."""
        return SeparableConv(self, inputs, outputs, kernel, stride)


# --- layers ---------------------------------------------------------------------------------------


class SeparableConv(nn.Module):
    """mmcv's `DepthwiseSeparableConvModule`; keys `depthwise_conv`, `pointwise_conv`."""

    def __init__(self, style: ConvStyle, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.depthwise_conv = ConvModule(
            inputs,
            inputs,
            kernel,
            stride=stride,
            groups=inputs,
            norm=style.norm,
            activation=style.activation,
        )
        self.pointwise_conv = style.conv(inputs, outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        found: Tensor = self.pointwise_conv(self.depthwise_conv(maps))
        return found


class Focus(nn.Module):
    """Every second pixel of every second row as channels, then a 3x3 convolution; takes even sizes."""

    def __init__(self, style: ConvStyle, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = style.conv(inputs * 4, outputs, 3)

    def forward(self, images: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / 2, w / 2]."""
        corners = [images[..., row::2, column::2] for column in (0, 1) for row in (0, 1)]
        found: Tensor = self.conv(torch.cat(corners, 1))
        return found


def max_pool(maps: Tensor, kernel: int) -> Tensor:
    """The largest of a neighbourhood of every pixel."""
    return nn.functional.max_pool2d(maps, kernel, stride=1, padding=kernel // 2)


def pyramid(maps: Tensor, kernels: int | Sequence[int]) -> Tensor:
    """Maps beside their max-pools: of each kernel, or of one kernel once, twice and three times."""
    pooled = [maps]
    if isinstance(kernels, int):
        for _ in range(3):
            pooled.append(max_pool(pooled[-1], kernels))
    else:
        pooled += [max_pool(maps, kernel) for kernel in kernels]
    return torch.cat(pooled, 1)


class PyramidPooling(nn.Module):
    """mmdet's `SPPBottleneck` and mmyolo's `SPPFBottleneck`; keys `conv1`, `conv2`."""

    def __init__(
        self, style: ConvStyle, inputs: int, outputs: int, kernels: int | tuple[int, ...] = 5
    ) -> None:
        super().__init__()
        self.kernels = kernels
        hidden = inputs // 2
        self.conv1 = style.conv(inputs, hidden)
        self.conv2 = style.conv(hidden * (4 if isinstance(kernels, int) else len(kernels) + 1), outputs)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        found: Tensor = self.conv2(pyramid(self.conv1(maps), self.kernels))
        return found


class Bottleneck(nn.Module):
    """Two convolutions `conv1`, `conv2` and, with `identity`, a shortcut around them."""

    def __init__(self, first: nn.Module, second: nn.Module, *, identity: bool) -> None:
        super().__init__()
        self.conv1 = first
        self.conv2 = second
        self.identity = identity

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv2(self.conv1(maps))
        return found + maps if self.identity else found


def darknet_block(style: ConvStyle, width: int, *, identity: bool, separable: bool = False) -> Bottleneck:
    """mmdet's `DarknetBottleneck`, 1x1 and 3x3."""
    second = style.separable if separable else style.conv
    return Bottleneck(style.conv(width, width), second(width, width, 3), identity=identity)


def cspnext_block(style: ConvStyle, width: int, *, identity: bool, separable: bool = False) -> Bottleneck:
    """mmdet's `CSPNeXtBlock`, 3x3 and separable 5x5."""
    first = style.separable if separable else style.conv
    return Bottleneck(first(width, width, 3), style.separable(width, width, 5), identity=identity)


class ChannelGate(nn.Module):
    """mmdet's `ChannelAttention`: channels weighed by a hard sigmoid of their means; key `fc`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc = nn.Conv2d(width, width, 1)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        return maps * nn.functional.hardsigmoid(self.fc(maps.mean((2, 3), keepdim=True)))


class CSPLayer(nn.Module):
    """A cross-stage partial layer: blocks on one half of the channels, the other beside them."""

    def __init__(
        self,
        style: ConvStyle,
        width: int,
        hidden: int,
        blocks: Sequence[nn.Module],
        *,
        gate: bool = False,
        inputs: int | None = None,
    ) -> None:
        super().__init__()
        self.main_conv = style.conv(inputs or width, hidden)
        self.short_conv = style.conv(inputs or width, hidden)
        self.final_conv = style.conv(2 * hidden, width)
        self.blocks = nn.Sequential(*blocks)
        self.attention = ChannelGate(2 * hidden) if gate else None

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        halves = torch.cat((self.blocks(self.main_conv(maps)), self.short_conv(maps)), 1)
        found: Tensor = self.final_conv(halves if self.attention is None else self.attention(halves))
        return found


# --- plugins --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AttentionSpec:
    """A CBAM behind the stages that `stages` says, or behind all of them."""

    reduce_ratio: int
    kernel: int
    activation: ActivationSpec
    stages: tuple[bool, ...] | None

    def at(self, stage: int) -> bool:
        """Whether stage `stage`, counted from 0, has it."""
        return self.stages is None or self.stages[stage]


class _ChannelAttention(nn.Module):
    """Gates of the channels, from their means and their maxima."""

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        hidden = width // spec.reduce_ratio
        self.fc = nn.Sequential(
            ConvModule(width, hidden, 1, norm=None, activation=spec.activation),
            ConvModule(hidden, width, 1, norm=None, activation=PLAIN),
        )

    def forward(self, maps: Tensor) -> Tensor:
        means, maxima = maps.mean((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
        return torch.sigmoid(self.fc(means) + self.fc(maxima))


class _SpatialAttention(nn.Module):
    """Gates of the pixels, from the mean and the maximum over channels."""

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__()
        self.conv = ConvModule(2, 1, spec.kernel, norm=None, activation=ActivationSpec("sigmoid"))

    def forward(self, maps: Tensor) -> Tensor:
        found: Tensor = self.conv(torch.cat((maps.mean(1, keepdim=True), maps.amax(1, keepdim=True)), 1))
        return found


class BlockAttention(nn.Module):
    """CBAM (Woo et al., arXiv:1807.06521), mmyolo's plugin."""

    def __init__(self, spec: AttentionSpec, width: int) -> None:
        super().__init__()
        self.channel_attention = _ChannelAttention(spec, width)
        self.spatial_attention = _SpatialAttention(spec)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = self.channel_attention(maps) * maps
        found: Tensor = self.spatial_attention(maps) * maps
        return found


# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagedSpec:
    """What decides the numbers and the names of the weights. `widths` are of the stem and of the stages."""

    widths: tuple[int, ...]
    style: ConvStyle
    in_channels: int = 3
    plugins: tuple[AttentionSpec, ...] = ()

    def strides(self) -> tuple[int, ...]:
        """Strides of the stem and of the stages."""
        return tuple(2 ** (level + 1) for level in range(len(self.widths)))

    def features(self) -> tuple[FeatureInfo, ...]:
        """The maps of the stem and of the stages."""
        return map_features(self.widths, self.strides())


class StagedBackbone(Backbone):
    """A `stem` and `stage1` to `stage{n}`; a node is an index, 0 is the stem."""

    def __init__(self, spec: StagedSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = self.make_stem()
        for stage, width in enumerate(spec.widths[1:]):
            plugins = [BlockAttention(plugin, width) for plugin in spec.plugins if plugin.at(stage)]
            self.add_module(f"stage{stage + 1}", nn.Sequential(*self.make_stage(stage), *plugins))

    @abstractmethod
    def make_stem(self) -> nn.Module:
        """What comes before the stages."""

    @abstractmethod
    def make_stage(self, stage: int) -> list[nn.Module]:
        """The layers of stage `stage`, counted from 0."""

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stem and the stages in `nodes`; stops after the deepest of them."""
        found = {"0": self.stem(images)}
        for index in range(1, max(int(node) for node in nodes) + 1):
            found[str(index)] = getattr(self, f"stage{index}")(found[str(index - 1)])
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """0 is the stem, k the stem and `stage1` to `stage{k}`; their norms are in eval."""
        return frozen_by_stage(self, freeze, lambda k: ("stem", *(f"stage{i}" for i in range(1, k + 1))))


# --- configs --------------------------------------------------------------------------------------


class Row(NamedTuple):
    """One stage as the libraries' tables have it, before `deepen_factor` and `widen_factor`."""

    inputs: Annotated[int, Field(strict=True, ge=8, le=4096)]
    outputs: Annotated[int, Field(strict=True, ge=8, le=4096)]
    blocks: Annotated[int, Field(strict=True, ge=1, le=32)]


class CSPRow(NamedTuple):
    """A stage of CSP layers; `identity`: shortcuts around its blocks, `pyramid`: spatial pyramid pooling."""

    inputs: Annotated[int, Field(strict=True, ge=8, le=4096)]
    outputs: Annotated[int, Field(strict=True, ge=8, le=4096)]
    blocks: Annotated[int, Field(strict=True, ge=1, le=32)]
    identity: bool
    pyramid: bool


def _odd(kernel: int) -> int:
    if kernel % 2 == 0:
        raise ValueError("must be odd")
    return kernel


# Pools of an even kernel would give larger maps than they get.
PoolKernel = Annotated[int, Field(strict=True, ge=1, le=31), AfterValidator(_odd)]
PoolKernels = Annotated[tuple[PoolKernel, ...], Field(min_length=1, max_length=8)]


def rounded_up(width: int, factor: float) -> int:
    """mmyolo's width: a multiple of 8, never less than asked."""
    return math.ceil(width * factor / 8) * 8


def deepened(blocks: int, factor: float) -> int:
    """The number of blocks, at least one."""
    return max(round(blocks * factor), 1)


class AttentionConfig(BaseModel):
    """`cfg` of a plugin."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["CBAM"]
    reduce_ratio: Annotated[int, Field(strict=True, ge=1, le=1024)] = 16
    kernel_size: Literal[1, 3, 5, 7, 9, 11] = 7
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")


class PluginConfig(BaseModel):
    """mmyolo's plugins: modules behind stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cfg: AttentionConfig
    stages: Annotated[tuple[bool, ...], Field(max_length=8)] | None = Field(
        None, description="Which stages have it, one entry a stage; all where not given."
    )

    def spec(self) -> AttentionSpec:
        """The neutral spelling."""
        cfg = self.cfg
        return AttentionSpec(cfg.reduce_ratio, cfg.kernel_size, cfg.act_cfg.spec(), self.stages)


YOLO_NORM = NormConfig(type="BN", momentum=0.03, eps=1e-3)
SILU = ActivationConfig(type="SiLU")


class StagedConfig(OpenMMLabConfig):
    """The keys that these backbones have in common."""

    deepen_factor: Annotated[float, Field(gt=0, le=3)] = Field(
        1.0, description="Multiplies the numbers of blocks."
    )
    widen_factor: Annotated[float, Field(ge=0.05, le=4)] = Field(1.0, description="Multiplies the channels.")
    out_indices: Indices = Field((2, 3, 4), description="0 is the stem, k is stage k.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=8)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    norm_cfg: NormConfig = YOLO_NORM
    act_cfg: ActivationConfig | None = Field(SILU, description="null is none.")

    @abstractmethod
    def spec(self) -> StagedSpec:
        """The neutral spelling."""

    @abstractmethod
    def network(self) -> StagedBackbone:
        """The network of these keys, without its weights."""

    def style(self) -> ConvStyle:
        """How convolutions are normed and activated."""
        return ConvStyle(self.norm_cfg.spec(), PLAIN if self.act_cfg is None else self.act_cfg.spec())

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        if self.frozen_stages >= len(spec.widths):
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(spec.widths) - 1} stages"
        if (fault := self.norm_cfg.fault()) is not None:
            yield "norm_cfg/num_groups", fault
        if self.norm_cfg.type == "GN" and not groups_divide(self.network):
            yield "norm_cfg/num_groups", f"{self.norm_cfg.num_groups} groups do not divide every width"


def groups_divide(make: Callable[[], nn.Module]) -> bool:
    """Whether the group norms of the network that `make` builds divide their channels; builds it on meta."""
    try:
        building.on_meta(make)
    except ValueError:  # what torch's group norm raises
        return False
    return True


class YoloConfig(StagedConfig):
    """What mmyolo's backbones take besides. Those whose stem takes RGB only narrow `input_channels`."""

    input_channels: InputChannels = 3
    plugins: Annotated[tuple[PluginConfig, ...], Field(max_length=8)] | None = Field(
        None, description="Attention behind stages: [{'cfg': {'type': 'CBAM'}, 'stages': [false, …]}]."
    )

    def plugin_specs(self) -> tuple[AttentionSpec, ...]:
        """The neutral spelling of `plugins`."""
        return tuple(plugin.spec() for plugin in self.plugins or ())

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and what plugins ask of the stages."""
        yield from self._plugin_faults()
        yield from super().faults()

    def _plugin_faults(self) -> Iterator[tuple[str, str]]:
        widths = self.spec().widths[1:]
        for position, plugin in enumerate(self.plugin_specs()):
            place = f"plugins/{position}"
            if plugin.stages is not None and len(plugin.stages) != len(widths):
                yield (
                    f"{place}/stages",
                    f"has {len(plugin.stages)} entries for {len(widths)} stages",
                )
                return
            narrowest = min((width for stage, width in enumerate(widths) if plugin.at(stage)), default=None)
            if narrowest is not None and narrowest < plugin.reduce_ratio:
                yield f"{place}/cfg/reduce_ratio", f"is more than the {narrowest} channels of a stage"


def chain_fault(rows: Sequence[Row | CSPRow]) -> str | None:
    """What is wrong with a table of stages: each takes what the one before gives."""
    for before, row in pairwise(rows):
        if row.inputs != before.outputs:
            return f"a stage takes {row.inputs} channels, the one before gives {before.outputs}"
    return None
