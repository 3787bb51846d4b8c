"""mmdet's necks of detectors of their own: SSDNeck, SSH, DilatedEncoder (YOLOF), CTResNetNeck (CenterNet)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import BATCH_NORM, NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, ConvModule, Scale, make_activation
from service.errors import InvalidConfig
from service.necks.base import POINTER, LevelFacts, Neck, require_maps
from service.necks.layers import DeformableConv
from service.necks.openmmlab import (
    MAX_LEVELS,
    NO_ACTIVATION,
    OpenMMLabNeckConfig,
    Width,
    Widths,
    activation_spec,
    make_neck_family,
    norm_spec,
    numbered,
    require_widths,
)

RELU = ActivationSpec()

# --- SSDNeck --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExtraSpec:
    """One extra level of SSD: two convolutions, the second of this kernel, stride and padding."""

    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int


@dataclass(frozen=True)
class SSDSpec:
    """What decides the numbers and the names of the weights; `scale` is where the first level's begin."""

    normed: int | None
    scale: float
    extra: tuple[ExtraSpec, ...]
    separable: bool
    norm: NormSpec | None
    activation: ActivationSpec


class L2Norm(Scale):
    """Every pixel's channels at length 1, each times a weight (Liu et al., arXiv:1506.04579); key `weight`."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.full((width,), scale))

    def start(self) -> None:
        """All channels weigh `scale`."""
        nn.init.constant_(self.weight, self.scale)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape; computed in float32."""
        wide = maps.float()
        length = wide.pow(2).sum(1, keepdim=True).sqrt() + 1e-10
        return (self.weight[:, None, None].float() * wide / length).type_as(maps)


class SeparableConv(nn.Module):
    """mmcv's `DepthwiseSeparableConvModule`; keys `depthwise_conv`, `pointwise_conv`."""

    def __init__(self, spec: SSDSpec, layer: ExtraSpec) -> None:
        super().__init__()
        inputs = layer.outputs // 2
        self.depthwise_conv = ConvModule(
            inputs,
            inputs,
            layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            groups=inputs,
            norm=spec.norm,
            activation=spec.activation,
        )
        self.pointwise_conv = ConvModule(inputs, layer.outputs, 1, norm=spec.norm, activation=spec.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h', w']."""
        found: Tensor = self.pointwise_conv(self.depthwise_conv(maps))
        return found


class SSDNeck(Neck):
    """SSD's extra levels (Liu et al., arXiv:1512.02325); keys `l2_norm`, `extra_layers.{i}.0`, `extra_layers.{i}.1`."""

    def __init__(self, spec: SSDSpec) -> None:
        super().__init__()
        self.l2_norm = L2Norm(spec.normed, spec.scale) if spec.normed is not None else None
        self.extra_layers = nn.ModuleList(self._extra(spec, layer) for layer in spec.extra)

    @staticmethod
    def _extra(spec: SSDSpec, layer: ExtraSpec) -> nn.Sequential:
        hidden = layer.outputs // 2
        first = ConvModule(layer.inputs, hidden, 1, norm=spec.norm, activation=spec.activation)
        if spec.separable:
            return nn.Sequential(first, SeparableConv(spec, layer))
        second = ConvModule(
            hidden,
            layer.outputs,
            layer.kernel,
            stride=layer.stride,
            padding=layer.padding,
            norm=spec.norm,
            activation=spec.activation,
        )
        return nn.Sequential(first, second)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to the same and the extra levels above the last."""
        levels = list(features)
        if self.l2_norm is not None:
            levels[0] = self.l2_norm(levels[0])
        for layer in self.extra_layers:
            levels.append(layer(levels[-1]))
        return levels


Steps = Annotated[tuple[Annotated[int, Field(strict=True, ge=1, le=4)], ...], Field(max_length=MAX_LEVELS)]
Paddings = Annotated[tuple[Annotated[int, Field(strict=True, ge=0, le=4)], ...], Field(max_length=MAX_LEVELS)]


class SSDConfig(OpenMMLabNeckConfig):
    """`mmdet.SSDNeck`."""

    NETWORK: ClassVar[str] = "SSDNeck"

    in_channels: Widths = Field(description="Channels of every level that the backbone gives.")
    out_channels: Widths = Field(description="Channels of what comes out; it begins with in_channels.")
    level_strides: Steps = Field(description="Of each extra level to the one before.")
    level_paddings: Paddings = Field(description="Of the convolution of each extra level.")
    l2_norm_scale: Annotated[float, Field(ge=0, le=1e4)] | None = Field(
        20.0, description="Where the weights of the first level's norm begin; 0 and null are no norm."
    )
    last_kernel_size: Annotated[int, Field(strict=True, ge=1, le=11)] = Field(
        3, description="Of the convolution of the last level."
    )
    use_depthwise: bool = Field(False, description="The convolutions of extra levels are separable.")
    norm_cfg: NormConfig | None = Field(None, description="null is none.")
    act_cfg: ActivationConfig | None = Field(ActivationConfig(type="ReLU"), description="null is none.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        extra = len(self.out_channels) - len(self.in_channels)
        if extra < 1 or self.out_channels[: len(self.in_channels)] != self.in_channels:
            yield "out_channels", "must begin with in_channels and go on"
        for key in ("level_strides", "level_paddings"):
            if len(getattr(self, key)) != extra:
                yield key, f"has {len(getattr(self, key))} entries for {extra} extra levels"
        if min(self.out_channels[len(self.in_channels) :]) < 2:
            yield "out_channels", "an extra level needs at least 2 channels"
        widths = self.out_channels[len(self.in_channels) :]
        yield from self.norm_faults(self.norm_cfg, [*widths, *(width // 2 for width in widths)])

    def spec(self) -> SSDSpec:
        """The neutral spelling."""
        first = len(self.in_channels) - 1
        steps = zip(pairwise(self.out_channels[first:]), self.level_strides, self.level_paddings, strict=True)
        extra = [ExtraSpec(*widths, 3, stride, padding) for widths, stride, padding in steps]
        last = extra.pop()
        kernel = self.last_kernel_size
        extra.append(ExtraSpec(last.inputs, last.outputs, kernel, last.stride, last.padding))
        return SSDSpec(
            self.in_channels[0] if self.l2_norm_scale else None,
            self.l2_norm_scale or 0.0,
            tuple(extra),
            self.use_depthwise,
            norm_spec(self.norm_cfg),
            activation_spec(self.act_cfg),
        )

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The levels that go in, and those above the last."""
        strides = [level.stride for level in levels]
        for step in self.level_strides:
            strides.append(None if strides[-1] is None else strides[-1] * step)
        return numbered(self.out_channels, strides)


# --- SSH ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SSHSpec:
    """What decides the numbers and the names of the weights."""

    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    norm: NormSpec | None


class ContextModule(nn.Module):
    """SSH's two wider views of 5x5 and 7x7 pixels, of 3x3 convolutions that they share; keys `conv5x5_1` and on."""

    def __init__(self, inputs: int, width: int, norm: NormSpec | None) -> None:
        super().__init__()
        self.conv5x5_1 = ConvModule(inputs, width, 3, norm=norm, activation=RELU)
        self.conv5x5_2 = ConvModule(width, width, 3, norm=norm, activation=NO_ACTIVATION)
        self.conv7x7_2 = ConvModule(width, width, 3, norm=norm, activation=RELU)
        self.conv7x7_3 = ConvModule(width, width, 3, norm=norm, activation=NO_ACTIVATION)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[n, inputs, h, w] to [n, width, h, w] twice."""
        shared = self.conv5x5_1(maps)
        return self.conv5x5_2(shared), self.conv7x7_3(self.conv7x7_2(shared))


class DetectionModule(nn.Module):
    """SSH's module of a level: three views beside each other; keys `conv3x3`, `context_module`."""

    def __init__(self, inputs: int, outputs: int, norm: NormSpec | None) -> None:
        super().__init__()
        self.conv3x3 = ConvModule(inputs, outputs // 2, 3, norm=norm, activation=NO_ACTIVATION)
        self.context_module = ContextModule(inputs, outputs // 4, norm)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h, w]."""
        return torch.relu(torch.cat((self.conv3x3(maps), *self.context_module(maps)), 1))


class SSH(Neck):
    """SSH's modules (Najibi et al., arXiv:1708.03979), one a level; keys `ssh_module{i}`."""

    def __init__(self, spec: SSHSpec) -> None:
        super().__init__()
        for place, widths in enumerate(zip(spec.in_channels, spec.out_channels, strict=True)):
            self.add_module(f"ssh_module{place}", DetectionModule(*widths, spec.norm))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, out_channels_i, h_i, w_i] each."""
        return [module(maps) for module, maps in zip(self.children(), features, strict=True)]


class SSHConfig(OpenMMLabNeckConfig):
    """`mmdet.SSH`."""

    NETWORK: ClassVar[str] = "SSH"

    num_scales: Annotated[int, Field(strict=True, ge=1, le=MAX_LEVELS)] = Field(
        description="Levels that go in and come out."
    )
    in_channels: Widths = Field(description="Channels of every level that goes in.")
    out_channels: Widths = Field(description="Channels of every level that comes out, multiples of 4.")
    norm_cfg: NormConfig | None = NormConfig(type="BN")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for key in ("in_channels", "out_channels"):
            if len(getattr(self, key)) != self.num_scales:
                yield key, f"has {len(getattr(self, key))} entries for {self.num_scales} scales"
        for place, width in enumerate(self.out_channels):
            if width % 4:
                yield f"out_channels/{place}", f"{width} is not a multiple of 4"
        yield from self.norm_faults(self.norm_cfg, [width // 4 for width in self.out_channels])

    def spec(self) -> SSHSpec:
        """The neutral spelling."""
        return SSHSpec(self.in_channels, self.out_channels, norm_spec(self.norm_cfg))

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in."""
        return numbered(self.out_channels, [level.stride for level in levels])


# --- necks of the last level ----------------------------------------------------------------------


class LastLevelConfig(OpenMMLabNeckConfig):
    """A neck over the last level that the backbone gives."""

    conv_cfg: None = None
    in_channels: Width = Field(description="Channels of the last level that the backbone gives.")

    def takes(self) -> tuple[int, ...]:
        """The width of the last level."""
        return (self.in_channels,)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse a last level that is not a map of this width."""
        require_maps(levels[-1:], self.type)
        require_widths(self.takes(), levels[-1:])


@dataclass(frozen=True)
class DilatedSpec:
    """What decides the numbers and the names of the weights: a block a dilation, `hidden` wide inside."""

    inputs: int
    outputs: int
    hidden: int
    dilations: tuple[int, ...]


class DilatedBlock(nn.Module):
    """A bottleneck whose 3x3 convolution is dilated; keys `conv1` to `conv3`."""

    def __init__(self, width: int, hidden: int, dilation: int) -> None:
        super().__init__()
        self.conv1 = ConvModule(width, hidden, 1, norm=BATCH_NORM, activation=RELU)
        self.conv2 = ConvModule(hidden, hidden, 3, dilation=dilation, norm=BATCH_NORM, activation=RELU)
        self.conv3 = ConvModule(hidden, width, 1, norm=BATCH_NORM, activation=RELU)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv3(self.conv2(self.conv1(maps))) + maps
        return found


class DilatedEncoder(Neck):
    """YOLOF's encoder (Chen et al., arXiv:2103.09460).

    Keys `lateral_conv`, `lateral_norm`, `fpn_conv`, `fpn_norm`, `dilated_encoder_blocks.{i}`.
    """

    def __init__(self, spec: DilatedSpec) -> None:
        super().__init__()
        width = spec.outputs
        self.lateral_conv = nn.Conv2d(spec.inputs, width, 1)
        self.lateral_norm = make_norm(BATCH_NORM, width)
        self.fpn_conv = nn.Conv2d(width, width, 3, padding=1)
        self.fpn_norm = make_norm(BATCH_NORM, width)
        blocks = [DilatedBlock(width, spec.hidden, dilation) for dilation in spec.dilations]
        self.dilated_encoder_blocks = nn.Sequential(*blocks)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] to [n, outputs, h, w]."""
        lateral = self.lateral_norm(self.lateral_conv(features[-1]))
        return [self.dilated_encoder_blocks(self.fpn_norm(self.fpn_conv(lateral)))]


Dilations = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=64)], ...], Field(min_length=1, max_length=MAX_LEVELS)
]


class DilatedConfig(LastLevelConfig):
    """`mmdet.DilatedEncoder`."""

    NETWORK: ClassVar[str] = "DilatedEncoder"

    out_channels: Width
    block_mid_channels: Width = Field(description="Channels inside of the blocks.")
    num_residual_blocks: Annotated[int, Field(strict=True, ge=0, le=MAX_LEVELS)] = Field(
        description="Blocks behind each other."
    )
    block_dilations: Dilations = Field(description="Of each block, as many as there are blocks or more.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if len(self.block_dilations) < self.num_residual_blocks:
            detail = f"has {len(self.block_dilations)} entries for {self.num_residual_blocks} blocks"
            yield "block_dilations", detail

    def spec(self) -> DilatedSpec:
        """The neutral spelling."""
        dilations = self.block_dilations[: self.num_residual_blocks]
        return DilatedSpec(self.in_channels, self.out_channels, self.block_mid_channels, dilations)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """One level of the last one's stride."""
        return numbered([self.out_channels], [levels[-1].stride])


@dataclass(frozen=True)
class CenterNetSpec:
    """What decides the network: how wide each step comes out, and the kernel that enlarges."""

    inputs: int
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    deformable: bool


class NormedConv(nn.Module):
    """mmcv's `ConvModule` around any convolution: a batch norm and a ReLU; keys `conv`, `bn`."""

    def __init__(self, conv: nn.Module, width: int) -> None:
        super().__init__()
        self.conv = conv
        self.bn = make_norm(BATCH_NORM, width)
        self.activate = make_activation(RELU)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h', w']."""
        found: Tensor = self.activate(self.bn(self.conv(maps)))
        return found


class CTResNetNeck(Neck):
    """CenterNet's steps (Zhou et al., arXiv:1904.07850), a 3x3 and a transposed convolution each.

    Keys `deconv_layers.{2i}`, `deconv_layers.{2i + 1}`.
    """

    def __init__(self, spec: CenterNetSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        steps = zip(pairwise((spec.inputs, *spec.widths)), spec.kernels, strict=True)
        for (inputs, width), kernel in steps:
            layers.append(NormedConv(self._first(spec, inputs, width), width))
            up = nn.ConvTranspose2d(width, width, kernel, stride=2, padding=1, bias=False)
            layers.append(NormedConv(up, width))
        self.deconv_layers = nn.Sequential(*layers)

    @staticmethod
    def _first(spec: CenterNetSpec, inputs: int, width: int) -> nn.Module:
        if spec.deformable:
            return DeformableConv(inputs, width, 3, bias=False)
        return nn.Conv2d(inputs, width, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] to [n, widths[-1], h * 2^steps, w * 2^steps]."""
        return [self.deconv_layers(features[-1])]


MAX_STEPS = 5
StepWidths = Annotated[tuple[Width, ...], Field(min_length=1, max_length=MAX_STEPS)]
Kernels = Annotated[tuple[Literal[2, 3, 4, 5, 6], ...], Field(min_length=1, max_length=MAX_STEPS)]


class CenterNetConfig(LastLevelConfig):
    """`mmdet.CTResNetNeck`."""

    NETWORK: ClassVar[str] = "CTResNetNeck"

    num_deconv_filters: StepWidths = Field(description="Channels that each step comes out with.")
    num_deconv_kernels: Kernels = Field(
        description="Of each step's transposed convolution; 4 is twice the size."
    )
    use_dcn: bool = Field(True, description="The 3x3 convolutions are modulated deformable ones.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if len(self.num_deconv_filters) != len(self.num_deconv_kernels):
            detail = f"has {len(self.num_deconv_kernels)} entries for {len(self.num_deconv_filters)} steps"
            yield "num_deconv_kernels", detail

    def spec(self) -> CenterNetSpec:
        """The neutral spelling."""
        return CenterNetSpec(self.in_channels, self.num_deconv_filters, self.num_deconv_kernels, self.use_dcn)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse a last level that is not a map of this width, or that gets larger than the image."""
        super().require(levels)
        stride, steps = levels[-1].stride, len(self.num_deconv_filters)
        if stride is not None and stride < 1 << steps:
            detail = f"{steps} steps make a level of stride {stride} larger than the image"
            raise InvalidConfig(f"{POINTER}/num_deconv_filters", detail)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """One level, whose stride is halved by each step."""
        stride = levels[-1].stride
        halved = None if stride is None else stride >> len(self.num_deconv_filters)
        return numbered([self.num_deconv_filters[-1]], [halved])


SSD_NECK = make_neck_family(
    SSDConfig,
    SSDNeck,
    example={
        "in_channels": [512, 1024, 2048],
        "out_channels": [512, 1024, 2048, 512, 256],
        "level_strides": [2, 2],
        "level_paddings": [1, 1],
    },
)
SSH_FAMILY = make_neck_family(
    SSHConfig,
    SSH,
    example={"num_scales": 3, "in_channels": [512, 1024, 2048], "out_channels": [256, 256, 256]},
)
DILATED_ENCODER = make_neck_family(
    DilatedConfig,
    DilatedEncoder,
    example={
        "in_channels": 2048,
        "out_channels": 512,
        "block_mid_channels": 128,
        "num_residual_blocks": 4,
        "block_dilations": [2, 4, 6, 8],
    },
)
CT_RESNET_NECK = make_neck_family(
    CenterNetConfig,
    CTResNetNeck,
    example={
        "in_channels": 2048,
        "num_deconv_filters": [256, 128, 64],
        "num_deconv_kernels": [4, 4, 4],
        "use_dcn": False,
    },
)
