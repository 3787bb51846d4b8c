"""NAS-FPN (Ghiasi et al., arXiv:1904.07392) as mmdet has it, and the cells of mmcv that it merges levels in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import NormSpec
from service.backbones.openmmlab import ActivationSpec, ConvModule
from service.necks.base import Neck
from service.necks.fpn import PyramidConfig
from service.necks.layers import ACTIVATED_FIRST, OrderedConv
from service.necks.openmmlab import NO_ACTIVATION, make_neck_family, norm_spec


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """[n, c, h, w] to a size: the nearest pixels where it is larger, the largest of windows where it is smaller.

    Which of the two is meant is what comes first, height or width, as in mmcv. What windows do not divide is
    padded with zeros on all sides.
    """
    own, wanted = tuple(maps.shape[2:]), tuple(size)
    if own == wanted:
        return maps
    if own < wanted:
        return F.interpolate(maps, size=list(wanted), mode="nearest")
    if any(have % want for have, want in zip(own, wanted, strict=True)):
        rows, columns = (math.ceil(h / want) * want - h for h, want in zip(own, wanted, strict=True))
        maps = F.pad(maps, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
    window = tuple(have // want for have, want in zip(maps.shape[2:], wanted, strict=True))
    return F.max_pool2d(maps, window, window)


class SumCell(nn.Module):
    """Two levels added at a size; key `out_conv`."""

    def __init__(self, width: int, norm: NormSpec | None, *, convolved: bool = True) -> None:
        super().__init__()
        self.out_conv: nn.Module = nn.Identity()
        if convolved:
            self.out_conv = OrderedConv(
                width, width, 3, order=ACTIVATED_FIRST, bias=True, norm=norm, activation=ActivationSpec()
            )

    def merged(self, first: Tensor, second: Tensor) -> Tensor:
        """Both, of one size, as one."""
        return first + second

    def forward(self, first: Tensor, second: Tensor, size: Sequence[int]) -> Tensor:
        """[n, width, h_i, w_i] each, to [n, width, *size]."""
        found: Tensor = self.out_conv(self.merged(resized(first, size), resized(second, size)))
        return found


class AttentionCell(SumCell):
    """mmcv's `GlobalPoolingCell`: the second level with the first, weighed by the means of the second."""

    def merged(self, first: Tensor, second: Tensor) -> Tensor:
        """Both, of one size, as one."""
        return second + second.mean((2, 3), keepdim=True).sigmoid() * first


@dataclass(frozen=True)
class NASSpec:
    """What decides the numbers and the names of the weights; `extra` levels above those used."""

    used: tuple[int, ...]
    start: int
    width: int
    extra: int
    stages: int
    norm: NormSpec | None


class Stage(nn.Module):
    """The seven merges that the search found, in order; keys `gp_64_4` (of p6 and p4, to p4) and so on."""

    def __init__(self, width: int, norm: NormSpec | None) -> None:
        super().__init__()
        self.gp_64_4 = AttentionCell(width, norm)
        self.sum_44_4 = SumCell(width, norm)
        self.sum_43_3 = SumCell(width, norm)
        self.sum_34_4 = SumCell(width, norm)
        self.gp_43_5 = AttentionCell(width, norm, convolved=False)
        self.sum_55_5 = SumCell(width, norm)
        self.gp_54_7 = AttentionCell(width, norm, convolved=False)
        self.sum_77_7 = SumCell(width, norm)
        self.gp_75_6 = AttentionCell(width, norm)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        """p3 to p7 to the same shapes."""
        p3, p4, p5, p6, p7 = levels
        at3, at4, at5, at6, at7 = (maps.shape[2:] for maps in levels)
        first = self.gp_64_4(p6, p4, at4)
        second = self.sum_44_4(first, p4, at4)
        p3 = self.sum_43_3(second, p3, at3)
        p4 = self.sum_34_4(p3, second, at4)
        p5 = self.sum_55_5(p5, self.gp_43_5(p4, p3, at5), at5)
        p7 = self.sum_77_7(p7, self.gp_54_7(p5, second, at7), at7)
        return [p3, p4, p5, self.gp_75_6(p7, p5, at6), p7]


class NASFPN(Neck):
    """Keys `lateral_convs.{i}`, `extra_downsamples.{i}.0`, `fpn_stages.{s}.{cell}.out_conv`."""

    def __init__(self, spec: NASSpec) -> None:
        super().__init__()
        self.start = spec.start
        self.lateral_convs = nn.ModuleList(self._lateral(spec, width) for width in spec.used)
        self.extra_downsamples = nn.ModuleList(
            nn.Sequential(self._lateral(spec, spec.width), nn.MaxPool2d(2, 2)) for _ in range(spec.extra)
        )
        self.fpn_stages = nn.ModuleList(Stage(spec.width, spec.norm) for _ in range(spec.stages))

    @staticmethod
    def _lateral(spec: NASSpec, inputs: int) -> ConvModule:
        return ConvModule(inputs, spec.width, 1, norm=spec.norm, activation=NO_ACTIVATION)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h_i, w_i] each, to [n, width, h_i, w_i] for the levels used and the extra ones."""
        used = features[self.start : self.start + len(self.lateral_convs)]
        levels = [conv(maps) for conv, maps in zip(self.lateral_convs, used, strict=True)]
        for downsample in self.extra_downsamples:
            levels.append(downsample(levels[-1]))
        for stage in self.fpn_stages:
            levels = stage(levels)
        return levels


class NASFPNConfig(PyramidConfig):
    """`mmdet.NASFPN`."""

    NETWORK: ClassVar[str] = "NASFPN"

    conv_cfg: None = None
    num_outs: Literal[5] = Field(description="Levels that come out.")
    stack_times: Annotated[int, Field(strict=True, ge=0, le=16)] = Field(
        description="Stages behind each other."
    )

    def spec(self) -> NASSpec:
        """The neutral spelling."""
        return NASSpec(
            self.in_channels[self.start_level : self.end()],
            self.start_level,
            self.out_channels,
            self.num_outs - self.used(),
            self.stack_times,
            norm_spec(self.norm_cfg),
        )


NAS_FPN = make_neck_family(
    NASFPNConfig,
    NASFPN,
    example={
        "in_channels": [256, 512, 1024, 2048],
        "out_channels": 256,
        "num_outs": 5,
        "start_level": 1,
        "stack_times": 7,
        "norm_cfg": {"type": "BN"},
    },
)
