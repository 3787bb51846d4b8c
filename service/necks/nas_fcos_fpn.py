"""NAS-FCOS's pyramid (Wang et al., arXiv:1906.04423) as mmdet has it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import BATCH_NORM, NormSpec, make_norm
from service.backbones.openmmlab import ActivationSpec, ConvModule
from service.necks.base import LevelFacts, Neck
from service.necks.fpn import PyramidConfig
from service.necks.layers import DeformableConv
from service.necks.nas_fpn import resized
from service.necks.openmmlab import (
    MAX_LEVELS,
    PlainConvConfig,
    doubled,
    make_neck_family,
    norm_spec,
    numbered,
)

# Which two of what there is are merged, and whether the second passes a convolution; each comes behind the rest.
CELLS = {
    "c22_1": (2, 2, True),
    "c22_2": (2, 2, True),
    "c32": (3, 2, False),
    "c02": (0, 2, False),
    "c42": (4, 2, True),
    "c36": (3, 6, True),
    "c61": (6, 1, True),
}
ADDED = 5  # to each of what comes out
OUT = ((9, 1), (8, 2), (7, 3))  # what comes out, and the input whose size it has


@dataclass(frozen=True)
class NASFCOSSpec:
    """What decides the numbers and the names of the weights; `deform_groups` None is plain convolutions."""

    used: tuple[int, ...]
    start: int
    width: int
    extra: int
    norm: NormSpec | None
    deform_groups: int | None


class InputConv(nn.Module):
    """A 3x3 convolution with a bias, a norm and a ReLU; keys `conv` and the norm's kind."""

    def __init__(self, spec: NASFCOSSpec) -> None:
        super().__init__()
        width, groups = spec.width, spec.deform_groups
        self.conv: nn.Module = nn.Conv2d(width, width, 3, padding=1)
        if groups is not None:
            self.conv = DeformableConv(width, width, 3, bias=True, groups=groups)
        self.norm_name = None if spec.norm is None else spec.norm.kind
        if spec.norm is not None:
            self.add_module(spec.norm.kind, make_norm(spec.norm, width))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        maps = self.conv(maps)
        return F.relu(maps if self.norm_name is None else getattr(self, self.norm_name)(maps))


class OutputConv(nn.Module):
    """A norm, a ReLU and a convolution of every two channels by themselves; keys `conv`, `bn`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * width, width, 1, groups=width, bias=False)
        self.bn = make_norm(BATCH_NORM, 2 * width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, 2 * width, h, w] to [n, width, h, w]."""
        found: Tensor = self.conv(F.relu(self.bn(maps)))
        return found


class ConcatCell(nn.Module):
    """Two levels beside each other at the larger one's size; keys `out_conv`, `input1_conv`, `input2_conv`."""

    def __init__(self, spec: NASFCOSSpec, *, second: bool) -> None:
        super().__init__()
        self.out_conv = OutputConv(spec.width)
        self.input1_conv = InputConv(spec)
        self.input2_conv: nn.Module = InputConv(spec) if second else nn.Identity()

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """[n, width, h_i, w_i] each, to [n, width, h, w]."""
        size = max(tuple(first.shape[2:]), tuple(second.shape[2:]))
        pair = (resized(self.input1_conv(first), size), resized(self.input2_conv(second), size))
        found: Tensor = self.out_conv(torch.cat(pair, 1))
        return found


class NASFCOSPyramid(Neck):
    """Keys `adapt_convs.{i}`, `fpn.{cell}`, `extra_downsamples.{i}.conv`."""

    def __init__(self, spec: NASFCOSSpec) -> None:
        super().__init__()
        self.start = spec.start
        relu, width = ActivationSpec(), spec.width
        self.adapt_convs = nn.ModuleList(
            ConvModule(inputs, width, 1, norm=BATCH_NORM, activation=relu) for inputs in spec.used
        )
        self.fpn = nn.ModuleDict(
            {name: ConcatCell(spec, second=second) for name, (_, _, second) in CELLS.items()}
        )
        self.extra_downsamples = nn.ModuleList(
            nn.ModuleDict({"conv": nn.Conv2d(width, width, 3, stride=2, padding=1)})
            for _ in range(spec.extra)
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, width, h_i, w_i] of the second to the fourth level, and the extra ones."""
        used = features[self.start : self.start + len(self.adapt_convs)]
        known = [conv(maps) for conv, maps in zip(self.adapt_convs, used, strict=True)]
        for name, (first, second, _) in CELLS.items():
            known.append(self.fpn[name](known[first], known[second]))
        added = known[ADDED]
        levels = [_summed(known[made], added, features[place].shape[2:]) for made, place in OUT]
        for place, downsample in enumerate(self.extra_downsamples.children()):
            below = F.relu(levels[-1]) if place else levels[-1]
            levels.append(downsample.get_submodule("conv")(below))
        return levels


def _summed(maps: Tensor, added: Tensor, size: Sequence[int]) -> Tensor:
    """Both added at the first one's size, then at this one."""
    both = maps + F.interpolate(added, size=maps.shape[2:], mode="bilinear")
    return F.interpolate(both, size=list(size), mode="bilinear")


class DeformableConfig(BaseModel):
    """`conv_cfg=dict(type='DCNv2', deform_groups=2)`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["DCNv2"]
    deform_groups: Annotated[int, Field(strict=True, ge=1, le=64)] = 1


ConvConfig = Annotated[DeformableConfig | PlainConvConfig, Field(discriminator="type")]


class NASFCOSConfig(PyramidConfig):
    """`mmdet.NASFCOS_FPN`."""

    NETWORK: ClassVar[str] = "NASFCOSPyramid"
    VIEW: ClassVar[frozenset[str]] = PyramidConfig.VIEW | {"add_extra_convs"}

    start_level: Annotated[int, Field(strict=True, ge=0, lt=MAX_LEVELS)] = Field(
        1, description="The first level used."
    )
    add_extra_convs: bool = Field(False, description="mmdet does not use it: extra levels are convolved.")
    conv_cfg: ConvConfig | None = Field(  # type: ignore[assignment]  # more than the other pyramids take
        None, description="Of the convolutions before levels are merged; null is Conv2d."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        if len(self.in_channels) <= OUT[-1][1]:
            yield "in_channels", f"has {len(self.in_channels)} entries; at least 4 levels go in"
        if self.used() < len(OUT):
            yield "start_level", f"{self.used()} levels are used; at least 3 are merged"
        groups = self._deform_groups()
        if groups is not None and self.out_channels % groups:
            yield "conv_cfg/deform_groups", f"{groups} groups do not divide {self.out_channels} channels"

    def _deform_groups(self) -> int | None:
        return self.conv_cfg.deform_groups if isinstance(self.conv_cfg, DeformableConfig) else None

    def spec(self) -> NASFCOSSpec:
        """The neutral spelling."""
        return NASFCOSSpec(
            self.in_channels[self.start_level : self.end()],
            self.start_level,
            self.out_channels,
            self.num_outs - self.used(),
            norm_spec(self.norm_cfg),
            self._deform_groups(),
        )

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The strides of the second to the fourth level, and doubled ones for the extra levels."""
        strides = doubled([levels[place].stride for _, place in OUT], self.num_outs - self.used())
        return numbered([self.out_channels] * len(strides), strides)


NAS_FCOS_FPN = make_neck_family(
    NASFCOSConfig,
    NASFCOSPyramid,
    example={
        "in_channels": [256, 512, 1024, 2048],
        "out_channels": 256,
        "num_outs": 5,
        "norm_cfg": {"type": "BN"},
        "conv_cfg": {"type": "DCNv2", "deform_groups": 2},
    },
)
