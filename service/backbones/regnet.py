"""RegNet (Radosavovic et al., arXiv:2003.13678) of mmpretrain and mmdet: ResNeXt with quantised linear widths."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from service.backbones.openmmlab_detection import DetectionKeys
from service.backbones.resnet import Channels, ResidualConfig, ResNetSpec, StageStrides, StemKind, family
from service.checkpoints.layouts import KeyLayout, Naming, rules

DIVISOR = 8
MAX_STAGES = 4


class RegNetArch(BaseModel):
    """The line of widths: `w0 + wa * i` for block i, quantised to powers of `wm` times `w0`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    w0: Annotated[int, Field(strict=True, ge=8, le=1024, multiple_of=DIVISOR)] = Field(
        description="Width of the first block."
    )
    wa: Annotated[float, Field(ge=0, le=512)] = Field(description="What each block adds.")
    wm: Annotated[float, Field(gt=1, le=16)] = Field(description="From one stage to the next.")
    group_w: Annotated[int, Field(strict=True, ge=1, le=512)] = Field(description="Channels of a group.")
    depth: Annotated[int, Field(strict=True, ge=1, le=128)] = Field(description="Number of blocks.")
    bot_mul: Annotated[float, Field(gt=0, le=8)] = Field(description="Inner width of a block over its width.")


def _arch(first_width: int, slope: float, multiplier: float, group_width: int, depth: int) -> RegNetArch:
    return RegNetArch(w0=first_width, wa=slope, wm=multiplier, group_w=group_width, depth=depth, bot_mul=1.0)


ArchName = Literal[
    "regnetx_400mf",
    "regnetx_800mf",
    "regnetx_1.6gf",
    "regnetx_3.2gf",
    "regnetx_4.0gf",
    "regnetx_6.4gf",
    "regnetx_8.0gf",
    "regnetx_12gf",
]
ARCHITECTURES: Mapping[ArchName, RegNetArch] = {
    "regnetx_400mf": _arch(24, 24.48, 2.54, 16, 22),
    "regnetx_800mf": _arch(56, 35.73, 2.28, 16, 16),
    "regnetx_1.6gf": _arch(80, 34.01, 2.25, 24, 18),
    "regnetx_3.2gf": _arch(88, 26.31, 2.25, 48, 25),
    "regnetx_4.0gf": _arch(96, 38.65, 2.43, 40, 23),
    "regnetx_6.4gf": _arch(184, 60.83, 2.07, 56, 17),
    "regnetx_8.0gf": _arch(80, 49.56, 2.88, 120, 23),
    "regnetx_12gf": _arch(168, 73.36, 2.37, 112, 19),
}


class Stage(NamedTuple):
    """One stage: its blocks, their output channels, and the groups of their 3x3 with the channels of each."""

    blocks: int
    width: int
    groups: int
    group_width: int


def stages_of(arch: RegNetArch) -> list[Stage]:
    """The stages that a line of widths gives; their widths are made to divide into groups."""
    return [_stage(arch, width, len(list(same))) for width, same in groupby(_block_widths(arch))]


def _block_widths(arch: RegNetArch) -> list[int]:
    widths = []
    for block in range(arch.depth):
        exponent = round(math.log((arch.w0 + arch.wa * block) / arch.w0) / math.log(arch.wm))
        widths.append(round(arch.w0 * arch.wm**exponent / DIVISOR) * DIVISOR)
    return widths


def _stage(arch: RegNetArch, width: int, blocks: int) -> Stage:
    inner = int(width * arch.bot_mul)
    group_width = max(1, min(arch.group_w, inner))
    fitted = int(round(inner / group_width) * group_width / arch.bot_mul)
    return Stage(blocks, fitted, round(fitted * arch.bot_mul) // group_width, group_width)


class RegNetKeys(ResidualConfig):
    """What RegNet takes in either library."""

    STAGE_STRIDES: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)
    PLAIN_STEM: ClassVar[StemKind] = "regnet"

    arch: Annotated[
        Annotated[ArchName, Tag("name")] | Annotated[RegNetArch, Tag("parameters")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "parameters"),
    ] = Field(description="A name, or the line of widths.")
    stem_channels: Channels = 32
    base_channels: Channels = Field(32, description="Not used by RegNet.")
    strides: StageStrides = (2, 2, 2, 2)
    deep_stem: Literal[False] = Field(False, description="Neither library has it for RegNet.")

    def parameters(self) -> RegNetArch:
        """The line of widths."""
        return ARCHITECTURES[self.arch] if isinstance(self.arch, str) else self.arch

    def stages(self) -> int:
        """How many stages there are."""
        return len(stages_of(self.parameters()))

    @abstractmethod
    def inner_width(self, stage: Stage) -> int:
        """Channels of a grouped 3x3 of more than one group."""

    def faults(self) -> Iterator[tuple[str, str]]:
        """As all residual networks, and what the widths do not allow."""
        stages = stages_of(self.parameters())
        if len(stages) > MAX_STAGES:
            yield "arch", f"makes {len(stages)} stages; at most {MAX_STAGES} are served"
        if any(stage.groups < 1 or self._inner(stage) < 1 for stage in stages):
            yield "arch", "makes a stage without channels"
        yield from super().faults()

    def _inner(self, stage: Stage) -> int:
        # Both libraries forget bot_mul where there is one group.
        return stage.width if stage.groups == 1 else self.inner_width(stage)

    def spec(self) -> ResNetSpec:
        """The neutral spelling."""
        stages = stages_of(self.parameters())
        return ResNetSpec(
            block="bottleneck",
            blocks=tuple(stage.blocks for stage in stages),
            widths=tuple(stage.width for stage in stages),
            inner=tuple(self._inner(stage) for stage in stages),
            groups=tuple(stage.groups for stage in stages),
            strides=self.stage_strides(),
            dilations=self.stage_dilations(),
            in_channels=self.in_channels,
            stem_channels=self.stem_channels,
            stem=self.stem(),
            avg_down=self.avg_down,
            pool_at_stride_1=self.avg_down and self.POOL_AT_STRIDE_1,
            stride_on_1x1=self.style == "caffe",
            norm=self.norm_cfg.spec(),
            standardises_weights=self.standardises_weights(),
            deform=self.deform(),
            plugins=self.plugin_specs(),
        )


class PretrainRegNetKeys(RegNetKeys):
    """`mmpretrain.RegNet`."""

    TYPE: ClassVar[str] = "mmpretrain.RegNet"

    def inner_width(self, stage: Stage) -> int:
        """Channels of a grouped 3x3 of more than one group."""
        return stage.groups * stage.group_width


class DetectionRegNetKeys(DetectionKeys, RegNetKeys):
    """`mmdet.RegNet`."""

    TYPE: ClassVar[str] = "mmdet.RegNet"
    HAS_DEFORMABLE: ClassVar[bool] = True
    HAS_PLUGINS: ClassVar[bool] = True

    stem_channels: Channels = 32
    base_channels: Channels = Field(32, description="Not used by RegNet.")
    strides: StageStrides = (2, 2, 2, 2)
    deep_stem: Literal[False] = Field(False, description="Neither library has it for RegNet.")

    def inner_width(self, stage: Stage) -> int:
        """Channels of a grouped 3x3 of more than one group."""
        return math.floor(stage.width * (stage.group_width / stage.width)) * stage.groups


TORCHVISION_PARTS = {
    "downsample.0": "proj.0", "downsample.1": "proj.1",
    "conv1": "f.a.0", "bn1": "f.a.1", "conv2": "f.b.0", "bn2": "f.b.1", "conv3": "f.c.0", "bn3": "f.c.1",
}  # fmt: skip
REGNET_NAMES = Naming(
    "RegNet",
    own=("mmpretrain", "mmdet"),
    marks=("conv1.weight", "layer1.0.conv3.weight", "layer1.0.downsample.0.weight", "layer4.0.conv3.weight"),
    stem_kernel=("conv1.weight", 3),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "conv1.{leaf}": "stem.conv.{leaf}",
                    "bn1.{leaf}": "stem.bn.{leaf}",
                    "layer{s}.{b}.conv{k}.{leaf}": "s{s}.b{b+1}.conv{k}.conv.{leaf}",
                    "layer{s}.{b}.bn{k}.{leaf}": "s{s}.b{b+1}.conv{k}.bn.{leaf}",
                    "layer{s}.{b}.downsample.0.{leaf}": "s{s}.b{b+1}.downsample.conv.{leaf}",
                    "layer{s}.{b}.downsample.1.{leaf}": "s{s}.b{b+1}.downsample.bn.{leaf}",
                }
            ),
        ),
        KeyLayout(
            "torchvision",
            rules(
                {
                    "conv1.{leaf}": "stem.0.{leaf}",
                    "bn1.{leaf}": "stem.1.{leaf}",
                    **{
                        f"layer{s}.{{b}}.{ours}.{{leaf}}": f"trunk_output.block{s}.block{s}-{{b}}.{theirs}.{{leaf}}"
                        for s in range(1, 5)
                        for ours, theirs in TORCHVISION_PARTS.items()
                    },
                }
            ),
        ),
    ),
)


REGNET = family(PretrainRegNetKeys, naming=REGNET_NAMES, choice="arch", choices=tuple(ARCHITECTURES))
MMDET_REGNET = family(DetectionRegNetKeys, naming=REGNET_NAMES, choice="arch", choices=tuple(ARCHITECTURES))
