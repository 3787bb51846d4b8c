"""FPN (Lin et al., arXiv:1612.03144) and PAFPN (Liu et al., arXiv:1803.01534), as mmdet has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, ConvModule
from service.backbones.standardised import standardise_weights
from service.necks.base import LevelFacts, Neck
from service.necks.openmmlab import (
    MAX_LEVELS,
    OpenMMLabNeckConfig,
    PlainConvConfig,
    Width,
    Widths,
    activation_spec,
    doubled,
    make_neck_family,
    norm_spec,
    numbered,
)

Mode = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "area"]
ALIGNED = frozenset({"bilinear", "bicubic"})
Source = Literal["on_input", "on_lateral", "on_output"]


@dataclass(frozen=True)
class UpsampleSpec:
    """How a level is brought to the size of the one below: by a factor, or to just that size."""

    mode: Mode = "nearest"
    factor: float | None = None
    align_corners: bool | None = None

    def apply(self, maps: Tensor, like: Tensor) -> Tensor:
        """[n, c, h, w] to the height and width of `like`, or by the factor."""
        size = like.shape[2:] if self.factor is None else None
        return F.interpolate(
            maps, size=size, scale_factor=self.factor, mode=self.mode, align_corners=self.align_corners
        )


@dataclass(frozen=True)
class FPNSpec:
    """What decides the numbers and the names of the weights.

    Levels `start` to `end` (excluded) of those that go in are used; `extra` come out above them, of convolutions
    from `source` or, where that is None, of max-pools. `standardises_weights` is
    `conv_cfg=dict(type="ConvWS")`.
    """

    in_channels: tuple[int, ...]
    out_channels: int
    start: int
    end: int
    extra: int
    source: Source | None
    relu_before_extra: bool
    lateral_norm: NormSpec | None
    norm: NormSpec | None
    activation: ActivationSpec
    upsample: UpsampleSpec = UpsampleSpec()
    standardises_weights: bool = False


class FPN(Neck):
    """Keys `lateral_convs.{i}.conv`, `fpn_convs.{i}.conv`, both counted from the first level used."""

    def __init__(self, spec: FPNSpec) -> None:
        super().__init__()
        self.spec = spec
        used = spec.in_channels[spec.start : spec.end]
        self.lateral_convs = nn.ModuleList(
            ConvModule(width, spec.out_channels, 1, norm=spec.lateral_norm, activation=spec.activation)
            for width in used
        )
        self.fpn_convs = nn.ModuleList(self.conv() for _ in used)
        if spec.source is not None:
            first = used[-1] if spec.source == "on_input" else None
            widths = [first if place == 0 else None for place in range(spec.extra)]
            self.fpn_convs.extend(self.conv(width, stride=2) for width in widths)
        if spec.standardises_weights:
            standardise_weights(self)

    def conv(self, inputs: int | None = None, *, stride: int = 1) -> ConvModule:
        """A 3x3 convolution to the neck's own width, by default from it."""
        spec, width = self.spec, self.spec.out_channels
        return ConvModule(
            inputs or width, width, 3, stride=stride, norm=spec.norm, activation=spec.activation
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, out_channels, h_i, w_i] for the levels used and the extra ones."""
        laterals = self.merged(features)
        levels = self.smoothed(laterals)
        sources = {"on_input": features[self.spec.end - 1], "on_lateral": laterals[-1]}
        return self._with_extra(levels, sources)

    def merged(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The levels used at the neck's own width, each with what comes down from those above."""
        used = features[self.spec.start : self.spec.end]
        laterals = [conv(maps) for conv, maps in zip(self.lateral_convs, used, strict=True)]
        for place in range(len(laterals) - 1, 0, -1):
            below = laterals[place - 1]
            laterals[place - 1] = below + self.spec.upsample.apply(laterals[place], below)
        return laterals

    def smoothed(self, laterals: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the levels used."""
        return [conv(maps) for conv, maps in zip(self.fpn_convs, laterals, strict=False)]

    def _with_extra(self, levels: list[Tensor], sources: dict[str, Tensor]) -> list[Tensor]:
        spec, used = self.spec, len(levels)
        for place in range(used, used + spec.extra):
            if spec.source is None:
                levels.append(F.max_pool2d(levels[-1], 1, stride=2))
                continue
            # "on_output" is the level before, as it is for all extra levels but the first.
            below = sources.get(spec.source, levels[-1]) if place == used else levels[-1]
            if spec.relu_before_extra and place > used:
                below = F.relu(below)
            levels.append(self.fpn_convs[place](below))
        return levels


class PAFPN(FPN):
    """An FPN with a path back up: keys `downsample_convs.{i}.conv`, `pafpn_convs.{i}.conv` besides."""

    def __init__(self, spec: FPNSpec) -> None:
        super().__init__(spec)
        steps = range(spec.end - spec.start - 1)
        self.downsample_convs = nn.ModuleList(self.conv(stride=2) for _ in steps)
        self.pafpn_convs = nn.ModuleList(self.conv() for _ in steps)
        if spec.standardises_weights:
            standardise_weights(self)

    def smoothed(self, laterals: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of the levels used."""
        climbing = super().smoothed(laterals)
        for place, conv in enumerate(self.downsample_convs):
            climbing[place + 1] = climbing[place + 1] + conv(climbing[place])
        above = zip(self.pafpn_convs, climbing[1:], strict=True)
        return [climbing[0], *(conv(maps) for conv, maps in above)]


# --- spellings ------------------------------------------------------------------------------------


class UpsampleConfig(BaseModel):
    """OpenMMLab's `upsample_cfg`: arguments of torch's `interpolate`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "nearest"
    scale_factor: Annotated[float, Field(ge=1, le=8)] | None = Field(
        None, description="null is the size of the level below."
    )
    align_corners: bool | None = Field(None, description="bilinear and bicubic only.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but torch does not, as (key, detail) of what has this as `upsample_cfg`."""
        if self.align_corners is not None and self.mode not in ALIGNED:
            yield "upsample_cfg/align_corners", f"is not for {self.mode}"

    def spec(self) -> UpsampleSpec:
        """The neutral spelling."""
        return UpsampleSpec(self.mode, self.scale_factor, self.align_corners)


class PyramidConfig(OpenMMLabNeckConfig):
    """The keys of pyramids that choose among the levels of a backbone, and put extra ones above them."""

    in_channels: Widths = Field(description="Channels of every level that the backbone gives.")
    out_channels: Width
    num_outs: Annotated[int, Field(strict=True, ge=1, le=MAX_LEVELS)] = Field(
        description="Levels that come out; those beyond the levels used are the extra ones."
    )
    start_level: Annotated[int, Field(strict=True, ge=0, lt=MAX_LEVELS)] = Field(
        0, description="The first level used."
    )
    end_level: Annotated[int, Field(strict=True, ge=-1, lt=MAX_LEVELS)] = Field(
        -1, description="The last level used; -1 is the last there is."
    )
    norm_cfg: NormConfig | None = Field(None, description="null is none.")

    def end(self) -> int:
        """The level after the last one used."""
        return len(self.in_channels) if self.end_level == -1 else self.end_level + 1

    def used(self) -> int:
        """How many levels are used."""
        return self.end() - self.start_level

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        levels, used = len(self.in_channels), self.used()
        if self.end() > levels:
            yield "end_level", f"{self.end_level} is not a level of 0 to {levels - 1}"
        elif used < 1:
            yield "start_level", f"{self.start_level} leaves none of the levels up to {self.end() - 1}"
        elif self.num_outs < used:
            yield "num_outs", f"{self.num_outs} is less than the {used} levels used"
        elif self.num_outs > used and self.end() < levels:
            yield "num_outs", f"{self.num_outs} is not the {used} levels up to end_level"
        yield from self.norm_faults(self.norm_cfg, [self.out_channels])

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the levels used, and doubled ones for the extra levels."""
        strides = [level.stride for level in levels[self.start_level : self.end()]]
        return numbered([self.out_channels] * self.num_outs, doubled(strides, self.num_outs - self.used()))


class ConvConfig(PlainConvConfig):
    """OpenMMLab's `conv_cfg`: the plain convolution, or ConvWS, which standardises its weights."""

    type: Literal["Conv2d", "Conv", "ConvWS"]  # type: ignore[assignment]  # one more than its base has


class PAFPNConfig(PyramidConfig):
    """`mmdet.PAFPN`."""

    NETWORK: ClassVar[str] = "PAFPN"

    conv_cfg: ConvConfig | None = Field(None, description="null is Conv2d; ConvWS standardises its weights.")
    add_extra_convs: bool | Source = Field(
        False, description="What extra levels are made of: false by max-pools, true as on_input."
    )
    relu_before_extra_convs: bool = Field(
        False, description="Before the second and the later extra convolutions."
    )
    no_norm_on_lateral: bool = False
    act_cfg: ActivationConfig | None = Field(None, description="null is none.")

    def spec(self) -> FPNSpec:
        """The neutral spelling."""
        extra = self.num_outs - self.used()
        norm = norm_spec(self.norm_cfg)
        return FPNSpec(
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            start=self.start_level,
            end=self.end(),
            extra=extra,
            source=self._source() if extra else None,
            relu_before_extra=self.relu_before_extra_convs and extra > 1,
            lateral_norm=None if self.no_norm_on_lateral else norm,
            norm=norm,
            activation=activation_spec(self.act_cfg),
            upsample=self.upsample(),
            standardises_weights=self.conv_cfg is not None and self.conv_cfg.type == "ConvWS",
        )

    def _source(self) -> Source | None:
        if isinstance(self.add_extra_convs, str):
            return self.add_extra_convs
        return "on_input" if self.add_extra_convs else None

    def upsample(self) -> UpsampleSpec:
        """How levels are enlarged."""
        return UpsampleSpec()


class FPNConfig(PAFPNConfig):
    """`mmdet.FPN`."""

    NETWORK: ClassVar[str] = "FPN"

    upsample_cfg: UpsampleConfig = UpsampleConfig()

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all of them, and an alignment of pixels that are not mixed."""
        yield from self.upsample_cfg.faults()
        yield from super().faults()

    def upsample(self) -> UpsampleSpec:
        """How levels are enlarged."""
        return self.upsample_cfg.spec()


class FPNDropBlockConfig(FPNConfig):
    """`mmdet.FPN_DropBlock`, which is an FPN in all but training."""

    VIEW: ClassVar[frozenset[str]] = FPNConfig.VIEW | {"plugin"}

    plugin: Annotated[dict[str, Any], Field(max_length=16)] | None = Field(
        None, description="Drops blocks of pixels; matters in training only."
    )


EXAMPLE = {"in_channels": [256, 512, 1024, 2048], "out_channels": 256, "num_outs": 5}
FPN_FAMILY = make_neck_family(FPNConfig, FPN, example=EXAMPLE)
FPN_DROP_BLOCK = make_neck_family(FPNDropBlockConfig, FPN, example=EXAMPLE)
PAFPN_FAMILY = make_neck_family(PAFPNConfig, PAFPN, example=EXAMPLE)
