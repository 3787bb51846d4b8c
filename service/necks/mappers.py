"""mmdet's necks that map levels without a pyramid of their own: ChannelMapper, HRFPN, YOLOV3Neck."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, ConvModule
from service.necks.base import LevelFacts, Neck
from service.necks.openmmlab import (
    MAX_LEVELS,
    NO_ACTIVATION,
    OpenMMLabNeckConfig,
    Width,
    Widths,
    activation_spec,
    doubled,
    make_neck_family,
    norm_spec,
    numbered,
)

NumOuts = Annotated[int, Field(strict=True, ge=1, le=MAX_LEVELS)]

# --- ChannelMapper --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChannelMapperSpec:
    """What decides the numbers and the names of the weights; `bias` None is where there is no norm."""

    in_channels: tuple[int, ...]
    out_channels: int
    kernel: int
    extra: int
    bias: bool | None
    norm: NormSpec | None
    activation: ActivationSpec


class ChannelMapper(Neck):
    """A convolution a level, `convs.{i}.conv`; extra levels by `extra_convs.{i}.conv` from the last input."""

    def __init__(self, spec: ChannelMapperSpec) -> None:
        super().__init__()
        self.convs = nn.ModuleList(self._conv(spec, width, spec.kernel) for width in spec.in_channels)
        above = [spec.in_channels[-1], *[spec.out_channels] * spec.extra][: spec.extra]
        self.extra_convs = nn.ModuleList(self._conv(spec, width, 3, stride=2) for width in above)

    @staticmethod
    def _conv(spec: ChannelMapperSpec, inputs: int, kernel: int, *, stride: int = 1) -> ConvModule:
        return ConvModule(
            inputs,
            spec.out_channels,
            kernel,
            stride=stride,
            padding=(kernel - 1) // 2,
            bias=spec.bias,
            norm=spec.norm,
            activation=spec.activation,
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, out_channels, h_i, w_i] and the extra levels."""
        levels = [conv(maps) for conv, maps in zip(self.convs, features, strict=True)]
        below = features[-1]
        for conv in self.extra_convs:
            below = conv(below)
            levels.append(below)
        return levels


class ChannelMapperConfig(OpenMMLabNeckConfig):
    """`mmdet.ChannelMapper`."""

    NETWORK: ClassVar[str] = "ChannelMapper"

    in_channels: Widths = Field(description="Channels of every level that the backbone gives.")
    out_channels: Width
    kernel_size: Literal[1, 3, 5, 7, 9, 11] = 3
    norm_cfg: NormConfig | None = Field(None, description="null is none.")
    act_cfg: ActivationConfig | None = Field(ActivationConfig(type="ReLU"), description="null is none.")
    bias: bool | Literal["auto"] = Field("auto", description="auto: where there is no norm.")
    num_outs: NumOuts | None = Field(None, description="null is as many as go in.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from self.norm_faults(self.norm_cfg, [self.out_channels])

    def spec(self) -> ChannelMapperSpec:
        """The neutral spelling."""
        return ChannelMapperSpec(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            kernel=self.kernel_size,
            extra=max((self.num_outs or 0) - len(self.in_channels), 0),
            bias=None if self.bias == "auto" else self.bias,
            norm=norm_spec(self.norm_cfg),
            activation=activation_spec(self.act_cfg),
        )

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels that go in, and doubled ones for the extra levels."""
        strides = doubled([level.stride for level in levels], self.spec().extra)
        return numbered([self.out_channels] * len(strides), strides)


# --- HRFPN ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HRFPNSpec:
    """What decides the numbers and the names of the weights. Its convolutions have neither norm nor activation."""

    in_channels: tuple[int, ...]
    out_channels: int
    num_outs: int
    stride: int
    pooling: Literal["AVG", "MAX"]


class HRFPN(Neck):
    """HRNet's levels at the size of the first, reduced by `reduction_conv` and pooled into a pyramid.

    Wang et al., arXiv:1908.07919; level i is pooled by 2^i and passes `fpn_convs.{i}`.
    """

    def __init__(self, spec: HRFPNSpec) -> None:
        super().__init__()
        self.spec = spec
        width = spec.out_channels
        self.reduction_conv = ConvModule(sum(spec.in_channels), width, 1, norm=None, activation=NO_ACTIVATION)
        self.fpn_convs = nn.ModuleList(
            ConvModule(width, width, 3, stride=spec.stride, norm=None, activation=NO_ACTIVATION)
            for _ in range(spec.num_outs)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h / 2^i, w / 2^i] each, to [n, out_channels, h / 2^i / stride, w / 2^i / stride] each."""
        enlarged = [
            F.interpolate(maps, scale_factor=2**place, mode="bilinear") if place else maps
            for place, maps in enumerate(features)
        ]
        reduced = self.reduction_conv(torch.cat(enlarged, 1))
        pool = F.avg_pool2d if self.spec.pooling == "AVG" else F.max_pool2d
        pooled = [reduced, *(pool(reduced, 2**place) for place in range(1, self.spec.num_outs))]
        return [conv(maps) for conv, maps in zip(self.fpn_convs, pooled, strict=True)]


class HRFPNConfig(OpenMMLabNeckConfig):
    """`mmdet.HRFPN`."""

    NETWORK: ClassVar[str] = "HRFPN"
    VIEW: ClassVar[frozenset[str]] = OpenMMLabNeckConfig.VIEW | {"with_cp", "norm_cfg"}

    in_channels: Widths = Field(description="Channels of every level that the backbone gives.")
    out_channels: Width
    num_outs: Annotated[int, Field(strict=True, ge=1, le=12)] = 5
    pooling_type: Literal["AVG", "MAX"] = "AVG"
    norm_cfg: NormConfig | None = Field(None, description="Accepted; mmdet does not use it.")
    with_cp: bool = Field(False, description="Saves memory in training; changes nothing here.")
    stride: Annotated[int, Field(strict=True, ge=1, le=8)] = Field(
        1, description="Of the convolutions that levels come out of."
    )

    def spec(self) -> HRFPNSpec:
        """The neutral spelling."""
        return HRFPNSpec(self.in_channels, self.out_channels, self.num_outs, self.stride, self.pooling_type)

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """Strides from the first level's, doubled each time."""
        first = levels[0].stride
        strides = doubled([None if first is None else first * self.stride], self.num_outs - 1)
        return numbered([self.out_channels] * self.num_outs, strides)


# --- YOLOV3Neck -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class YOLOV3Spec:
    """What decides the numbers and the names of the weights, both widths from the deepest level up."""

    in_channels: tuple[int, ...]
    out_channels: tuple[int, ...]
    norm: NormSpec | None
    activation: ActivationSpec


class DetectionBlock(nn.Module):
    """Five convolutions, 1x1 and 3x3 in turn; keys `conv1.conv` to `conv5.conv`."""

    def __init__(self, spec: YOLOV3Spec, inputs: int, width: int) -> None:
        super().__init__()
        widths = (inputs, width, 2 * width, width, 2 * width, width)
        for place in range(5):
            kernel = 3 if place % 2 else 1
            conv = ConvModule(
                widths[place], widths[place + 1], kernel, norm=spec.norm, activation=spec.activation
            )
            self.add_module(f"conv{place + 1}", conv)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, width, h, w]."""
        for conv in self.children():
            maps = conv(maps)
        return maps


class YOLOV3Neck(Neck):
    """YOLOv3's neck (Redmon and Farhadi, arXiv:1804.02767); the deepest level comes out first.

    Keys `detect{i}`, and `conv{i}` between them, counted from 1.
    """

    def __init__(self, spec: YOLOV3Spec) -> None:
        super().__init__()
        self.detect1 = DetectionBlock(spec, spec.in_channels[0], spec.out_channels[0])
        for place in range(1, len(spec.in_channels)):
            above, width = spec.out_channels[place - 1 : place + 1]
            conv = ConvModule(above, width, 1, norm=spec.norm, activation=spec.activation)
            self.add_module(f"conv{place}", conv)
            detect = DetectionBlock(spec, spec.in_channels[place] + width, width)
            self.add_module(f"detect{place + 1}", detect)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, shallow to deep, to [n, out_channels_i, h_i, w_i] each, deep to shallow."""
        levels = [self.detect1(features[-1])]
        for place, below in enumerate(reversed(features[:-1]), start=1):
            enlarged = F.interpolate(self.get_submodule(f"conv{place}")(levels[-1]), scale_factor=2)
            joined = torch.cat((enlarged, below), 1)
            levels.append(self.get_submodule(f"detect{place + 1}")(joined))
        return levels


class YOLOV3NeckConfig(OpenMMLabNeckConfig):
    """`mmdet.YOLOV3Neck`."""

    NETWORK: ClassVar[str] = "YOLOV3Neck"

    num_scales: NumOuts = Field(description="Levels that go in and come out.")
    in_channels: Widths = Field(description="Channels of the levels, the deepest first.")
    out_channels: Widths = Field(description="Channels of what comes out, the deepest first.")
    norm_cfg: NormConfig | None = NormConfig(type="BN")
    act_cfg: ActivationConfig | None = ActivationConfig(type="LeakyReLU", negative_slope=0.1)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for key in ("in_channels", "out_channels"):
            if len(getattr(self, key)) != self.num_scales:
                yield key, f"has {len(getattr(self, key))} entries for {self.num_scales} scales"
        yield from self.norm_faults(self.norm_cfg, self.out_channels)

    def spec(self) -> YOLOV3Spec:
        """The neutral spelling."""
        activation = activation_spec(self.act_cfg)
        return YOLOV3Spec(self.in_channels, self.out_channels, norm_spec(self.norm_cfg), activation)

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in, which are shallow to deep."""
        return tuple(reversed(self.in_channels))

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The levels that went in, the deepest first."""
        return numbered(self.out_channels, [level.stride for level in reversed(levels)])


CHANNEL_MAPPER = make_neck_family(
    ChannelMapperConfig,
    ChannelMapper,
    example={"in_channels": [256, 512, 1024, 2048], "out_channels": 256, "kernel_size": 1, "num_outs": 4},
)
HRFPN_FAMILY = make_neck_family(
    HRFPNConfig, HRFPN, example={"in_channels": [256, 512, 1024, 2048], "out_channels": 256}
)
YOLOV3_NECK = make_neck_family(
    YOLOV3NeckConfig,
    YOLOV3Neck,
    example={"num_scales": 3, "in_channels": [2048, 1024, 512], "out_channels": [512, 256, 128]},
)
