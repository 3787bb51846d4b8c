"""FPN_CARAFE: a pyramid whose levels are enlarged by their content (Wang et al., arXiv:1905.02188), as mmdet has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec
from service.necks.base import Neck
from service.necks.fpn import PyramidConfig
from service.necks.layers import Order, OrderedConv
from service.necks.openmmlab import activation_spec, make_neck_family, norm_spec

SCALE = 2


@dataclass(frozen=True)
class ReassemblySpec:
    """How pixels are made of a neighbourhood: `kernel` pixels wide, with weights of their own for every group."""

    kernel: int
    groups: int
    encoder_kernel: int
    encoder_dilation: int
    hidden: int


class Reassembly(nn.Module):
    """Twice the size, each pixel a mean weighed by what is there; keys `channel_compressor`, `content_encoder`."""

    def __init__(self, spec: ReassemblySpec, width: int) -> None:
        super().__init__()
        self.spec = spec
        weights = spec.kernel**2 * spec.groups * SCALE**2
        self.channel_compressor = nn.Conv2d(width, spec.hidden, 1)
        self.content_encoder = nn.Conv2d(
            spec.hidden,
            weights,
            spec.encoder_kernel,
            padding=(spec.encoder_kernel - 1) * spec.encoder_dilation // 2,
            dilation=spec.encoder_dilation,
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to [n, c, 2h, 2w]."""
        encoded = F.pixel_shuffle(self.content_encoder(self.channel_compressor(maps)), SCALE)
        count, _, height, width = encoded.shape
        return reassembled(maps, encoded.view(count, self.spec.groups, -1, height, width).softmax(2))


def reassembled(maps: Tensor, weights: Tensor) -> Tensor:
    """Sums over the neighbourhood of every pixel, what lies outside counted as 0.

    Args:
        maps: [n, c, h, w].
        weights: [n, groups, kernel * kernel, 2h, 2w], rows of the neighbourhood first.
    """
    count, channels, height, width = maps.shape
    groups, places = weights.shape[1:3]
    kernel = round(places**0.5)
    padded = F.pad(maps, [kernel // 2] * 4)
    found = maps.new_zeros(count, groups, channels // groups, SCALE * height, SCALE * width)
    for place in range(places):
        row, column = divmod(place, kernel)
        moved = padded[..., row : row + height, column : column + width]
        enlarged = F.interpolate(moved, scale_factor=SCALE).view_as(found)
        found = found + enlarged * weights[:, :, place, None]
    return found.flatten(1, 2)


@dataclass(frozen=True)
class CARAFESpec:
    """What decides the numbers and the names of the weights; `reassembly` None enlarges by pixels (`mode`)."""

    in_channels: tuple[int, ...]
    start: int
    end: int
    width: int
    levels: int
    norm: NormSpec | None
    activation: ActivationSpec
    order: Order
    reassembly: ReassemblySpec | None
    mode: Literal["nearest", "bilinear"] = "nearest"

    def conv(self, inputs: int, kernel: int, *, stride: int = 1) -> OrderedConv:
        """A convolution to the neck's width."""
        return OrderedConv(
            inputs,
            self.width,
            kernel,
            order=self.order,
            stride=stride,
            norm=self.norm,
            activation=self.activation,
        )

    def upsample(self) -> nn.Module:
        """What makes a level twice as large."""
        if self.reassembly is not None:
            return Reassembly(self.reassembly, self.width)
        return nn.Upsample(
            scale_factor=SCALE, mode=self.mode, align_corners=None if self.mode == "nearest" else False
        )


class CARAFEPyramid(Neck):
    """Keys `lateral_convs.{i}`, `fpn_convs.{i}`, `upsample_modules.{i}`, extra levels among them."""

    def __init__(self, spec: CARAFESpec) -> None:
        super().__init__()
        self.spec = spec
        used = spec.in_channels[spec.start : spec.end]
        extra = [used[-1], *[spec.width] * spec.levels][: spec.levels - len(used)]
        self.lateral_convs = nn.ModuleList(spec.conv(inputs, 1) for inputs in used)
        self.lateral_convs.extend(spec.conv(inputs, 3, stride=2) for inputs in extra)
        self.fpn_convs = nn.ModuleList(spec.conv(spec.width, 3) for _ in range(spec.levels))
        self.upsample_modules = nn.ModuleList(spec.upsample() for _ in range(spec.levels - 1))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, width, h_i, w_i] for the levels used and the extra ones."""
        used = features[self.spec.start : self.spec.end]
        sources = [*used, used[-1]]  # the first extra level too is of the last input
        laterals: list[Tensor] = []
        for place, conv in enumerate(self.lateral_convs):
            laterals.append(conv(sources[place] if place < len(sources) else laterals[-1]))
        for place in range(len(laterals) - 1, 0, -1):
            below = laterals[place - 1]
            enlarged = self.upsample_modules[place - 1](laterals[place])
            laterals[place - 1] = below + enlarged[..., : below.shape[2], : below.shape[3]]
        return [conv(maps) for conv, maps in zip(self.fpn_convs, laterals, strict=True)]


# --- spelling -------------------------------------------------------------------------------------

OddKernel = Literal[1, 3, 5, 7, 9]


class ReassemblyConfig(BaseModel):
    """`upsample_cfg=dict(type='carafe')`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["carafe"]
    up_kernel: OddKernel = Field(5, description="Pixels a side that a pixel is made of.")
    up_group: Annotated[int, Field(strict=True, ge=1, le=64)] = Field(
        1, description="Groups of channels with weights of their own."
    )
    encoder_kernel: OddKernel = 3
    encoder_dilation: Annotated[int, Field(strict=True, ge=1, le=8)] = 1
    compressed_channels: Annotated[int, Field(strict=True, ge=1, le=1024)] = 64

    def spec(self) -> ReassemblySpec:
        """The neutral spelling."""
        return ReassemblySpec(
            self.up_kernel,
            self.up_group,
            self.encoder_kernel,
            self.encoder_dilation,
            self.compressed_channels,
        )


class PixelsConfig(BaseModel):
    """`upsample_cfg=dict(type='nearest')`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["nearest", "bilinear"]


ConvolvedFirst = tuple[Literal["conv"], Literal["norm"], Literal["act"]]
ActivatedFirst = tuple[Literal["act"], Literal["conv"], Literal["norm"]]


class CARAFEConfig(PyramidConfig):
    """`mmdet.FPN_CARAFE`."""

    NETWORK: ClassVar[str] = "CARAFEPyramid"

    conv_cfg: None = None
    act_cfg: ActivationConfig | None = Field(None, description="null is none.")
    order: ConvolvedFirst | ActivatedFirst = Field(
        ("conv", "norm", "act"), description="Convolution, norm and activation in this order."
    )
    upsample_cfg: Annotated[ReassemblyConfig | PixelsConfig, Field(discriminator="type")] = Field(
        ReassemblyConfig(type="carafe"), description="How a level is made twice as large."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        given = self.upsample_cfg
        if isinstance(given, ReassemblyConfig) and self.out_channels % given.up_group:
            yield (
                "upsample_cfg/up_group",
                f"{given.up_group} groups do not divide {self.out_channels} channels",
            )

    def spec(self) -> CARAFESpec:
        """The neutral spelling."""
        given = self.upsample_cfg
        return CARAFESpec(
            self.in_channels,
            self.start_level,
            self.end(),
            self.out_channels,
            self.num_outs,
            norm_spec(self.norm_cfg),
            activation_spec(self.act_cfg),
            self.order,
            given.spec() if isinstance(given, ReassemblyConfig) else None,
            given.type if isinstance(given, PixelsConfig) else "nearest",
        )


FPN_CARAFE = make_neck_family(
    CARAFEConfig,
    CARAFEPyramid,
    example={"in_channels": [256, 512, 1024, 2048], "out_channels": 256, "num_outs": 5},
)
