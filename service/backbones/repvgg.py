"""RepVGG (Ding et al., arXiv:2101.03697) with mmpretrain's key names, as trained and as deployed."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels, Stride, levels_by_stride
from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
    ConvModule,
    OpenMMLabConfig,
    SqueezeExcite,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_activation,
    make_divisible,
    make_family,
    map_features,
    named_arch,
    norm_fault,
)
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level

SIGMOID = ActivationSpec("sigmoid")


@dataclass(frozen=True)
class Plan:
    """Blocks and factors of width of the stages.

    Every second block of the network has `groups`, or those that `group_layers` numbers from 1, its own. The
    squeezed channels of a block are a multiple of `squeeze_divisor`. `stem` is the most that the stem has.
    """

    blocks: tuple[int, ...]
    factors: tuple[float, ...]
    groups: int = 1
    squeeze_ratio: int | None = None
    stem: int = 64
    group_layers: tuple[tuple[int, int], ...] | None = None
    squeeze_divisor: int = 1

    def groups_of(self, number: int) -> int:
        """Groups of a block, counted from 1 through the stages."""
        if self.group_layers is not None:
            return dict(self.group_layers).get(number, 1)
        return self.groups if number % 2 == 0 else 1


B_BLOCKS = (4, 6, 16, 1)
ARCHS: dict[str, Plan] = {
    "A0": Plan((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    "A1": Plan((2, 4, 14, 1), (1, 1, 1, 2.5)),
    "A2": Plan((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    "B0": Plan(B_BLOCKS, (1, 1, 1, 2.5)),
    "B1": Plan(B_BLOCKS, (2, 2, 2, 4)),
    "B1g2": Plan(B_BLOCKS, (2, 2, 2, 4), groups=2),
    "B1g4": Plan(B_BLOCKS, (2, 2, 2, 4), groups=4),
    "B2": Plan(B_BLOCKS, (2.5, 2.5, 2.5, 5)),
    "B2g2": Plan(B_BLOCKS, (2.5, 2.5, 2.5, 5), groups=2),
    "B2g4": Plan(B_BLOCKS, (2.5, 2.5, 2.5, 5), groups=4),
    "B3": Plan(B_BLOCKS, (3, 3, 3, 5)),
    "B3g2": Plan(B_BLOCKS, (3, 3, 3, 5), groups=2),
    "B3g4": Plan(B_BLOCKS, (3, 3, 3, 5), groups=4),
    "D2se": Plan((8, 14, 24, 1), (2.5, 2.5, 2.5, 5), squeeze_ratio=16),
    "yolox-pai-small": Plan((3, 5, 7, 3), (1, 1, 1, 1), stem=32),
}


@dataclass(frozen=True)
class Place:
    """Where a block is and what it is between."""

    stage: int
    inputs: int
    outputs: int
    stride: int = 1
    dilation: int = 1
    groups: int = 1


@dataclass(frozen=True)
class RepVGGSpec:
    """What decides the numbers and the names of the weights.

    `deploy` blocks are one convolution. `pools_last`: the last stage ends with a pyramid of max-pools.
    """

    plan: Plan
    norm: NormSpec
    activation: ActivationSpec
    in_channels: int = 3
    base: int = 64
    strides: tuple[int, ...] = (2, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    deploy: bool = False
    pools_last: bool = False

    def stem(self) -> int:
        """Channels of the stem, no more than the first stage has."""
        return min(self.plan.stem, int(self.base * self.plan.factors[0]))

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(int(self.base * 2**i * factor) for i, factor in enumerate(self.plan.factors))

    def places(self) -> Iterator[Place]:
        """Every block behind the stem, in order."""
        inputs, number = self.stem(), 1
        for stage, width in enumerate(self.widths()):
            for position in range(self.plan.blocks[stage]):
                stride = self.strides[stage] if position == 0 else 1
                yield Place(stage, inputs, width, stride, self.dilations[stage], self.plan.groups_of(number))
                inputs, number = width, number + 1

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage; the stem strides by 2."""
        strides = [2 * math.prod(self.strides[: stage + 1]) for stage in range(len(self.strides))]
        return map_features(self.widths(), strides)


class Block(nn.Module):
    """A 3x3, a 1x1 and, where the shapes allow it, an identity branch, each with its norm; or their sum as one.

    Keys `branch_norm`, `branch_3x3`, `branch_1x1`, or `branch_reparam`; `se_layer`.
    """

    def __init__(self, spec: RepVGGSpec, place: Place) -> None:
        super().__init__()
        outputs = place.outputs
        self.deploy = spec.deploy
        if spec.deploy:
            self.branch_reparam = _convolution(place, 3, bias=True)
        else:
            straight = place.inputs == outputs and place.stride == 1
            self.branch_norm = make_norm(spec.norm, outputs) if straight else None
            self.branch_3x3 = normed(_convolution(place, 3, bias=False), spec.norm)
            self.branch_1x1 = normed(_convolution(place, 1, bias=False), spec.norm)
        ratio = spec.plan.squeeze_ratio
        self.se_layer = (
            SqueezeExcite(
                outputs,
                make_divisible(outputs // ratio, spec.plan.squeeze_divisor),
                first=ActivationSpec("relu"),
                gate=SIGMOID,
            )
            if ratio
            else None
        )
        self.act = make_activation(spec.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        mixed = self.branch_reparam(maps) if self.deploy else self._branches(maps)
        mixed = mixed if self.se_layer is None else self.se_layer(mixed)
        activated: Tensor = self.act(mixed)
        return activated

    def _branches(self, maps: Tensor) -> Tensor:
        mixed: Tensor = self.branch_3x3(maps) + self.branch_1x1(maps)
        return mixed if self.branch_norm is None else mixed + self.branch_norm(maps)


def _convolution(place: Place, kernel: int, *, bias: bool) -> nn.Conv2d:
    # A 1x1 convolution has nothing to dilate.
    dilation = place.dilation if kernel > 1 else 1
    return nn.Conv2d(
        place.inputs,
        place.outputs,
        kernel,
        stride=place.stride,
        padding=kernel // 2 * dilation,
        dilation=dilation,
        groups=place.groups,
        bias=bias,
    )


def normed(convolution: nn.Conv2d, norm: NormSpec) -> nn.Sequential:
    """A convolution and its norm; keys `conv`, `norm`."""
    return nn.Sequential(OrderedDict(conv=convolution, norm=make_norm(norm, convolution.out_channels)))


class PoolPyramid(nn.Module):
    """Three max-pools behind each other, seen together with what goes into them; keys `conv1`, `conv2`."""

    def __init__(self, channels: int, norm: NormSpec, activation: ActivationSpec) -> None:
        super().__init__()
        half = channels // 2
        self.conv1 = ConvModule(channels, half, 1, norm=norm, activation=activation)
        self.conv2 = ConvModule(4 * half, channels, 1, norm=norm, activation=activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        pooled = [self.conv1(maps)]
        for _ in range(3):
            pooled.append(F.max_pool2d(pooled[-1], 5, stride=1, padding=2))
        mixed: Tensor = self.conv2(torch.cat(pooled, dim=1))
        return mixed


class RepVGG(Backbone):
    """A stem and stages; keys `stem`, `stage_1`, …, and perhaps `ppf` behind the last."""

    def __init__(self, spec: RepVGGSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = Block(spec, Place(-1, spec.in_channels, spec.stem(), stride=2))
        for stage, places in itertools.groupby(spec.places(), lambda place: place.stage):
            self.add_module(f"stage_{stage + 1}", nn.Sequential(*(Block(spec, place) for place in places)))
        last = spec.widths()[-1]
        self.ppf = PoolPyramid(last, spec.norm, spec.activation) if spec.pools_last else None

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for stage in range(deepest(nodes) + 1):
            maps = getattr(self, f"stage_{stage + 1}")(maps)
            if self.ppf is not None and stage + 1 == len(self.features):
                maps = self.ppf(maps)
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is the stem, k adds `stage_1` to `stage_{k}`."""
        return frozen_by_stage(self, freeze, lambda k: ["stem", *(f"stage_{i + 1}" for i in range(k))])


# --- mmpretrain.RepVGG = mmcls.RepVGG -------------------------------------------------------------

Positive = Annotated[int, Field(strict=True, ge=1)]
MAX_STAGES = 6


class SqueezeConfig(BaseModel):
    """`se_cfg` of a custom `arch`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ratio: Annotated[Positive, Field(le=1024)] = 16
    divisor: Annotated[Positive, Field(le=64)] = 8


class ArchConfig(BaseModel):
    """A custom `arch`: blocks and factors of width, one a stage."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_blocks: Annotated[
        tuple[Annotated[Positive, Field(le=64)], ...], Field(min_length=1, max_length=MAX_STAGES)
    ]
    width_factor: Annotated[
        tuple[Annotated[float, Field(gt=0, le=16)], ...], Field(min_length=1, max_length=MAX_STAGES)
    ]
    group_layer_map: (
        Annotated[
            dict[Annotated[int, Field(ge=1, le=256)], Annotated[Positive, Field(le=512)]],
            Field(max_length=256),
        ]
        | None
    ) = Field(description="Groups of blocks, which are numbered from 1 through the stages.")
    se_cfg: SqueezeConfig | None = Field(description="Squeeze-and-excitation in every block.")
    stem_channels: Annotated[Positive, Field(le=512)] = 64

    def plan(self) -> Plan:
        """The neutral spelling."""
        squeeze = self.se_cfg or SqueezeConfig()
        return Plan(
            self.num_blocks,
            self.width_factor,
            squeeze_ratio=squeeze.ratio if self.se_cfg is not None else None,
            stem=self.stem_channels,
            group_layers=tuple(sorted((self.group_layer_map or {}).items())),
            squeeze_divisor=squeeze.divisor,
        )


class RepVGGConfig(OpenMMLabConfig):
    """`mmpretrain.RepVGG`, which is also `mmcls.RepVGG`."""

    NETWORK: ClassVar[str] = "RepVGG"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ]
    in_channels: InputChannels = 3
    base_channels: Annotated[int, Field(strict=True, ge=2, le=512)] = 64
    out_indices: Indices = Field((3,), description="Stages 0 to 3, at strides 4 to 32.")
    strides: tuple[Stride, ...] | None = Field(
        (2, 2, 2, 2),
        min_length=1,
        max_length=MAX_STAGES,
        description="Strides of the stages (1 or 2 each, as many as stages); "
        "or, 4 and above, ask for maps by stride instead of by index: [8, 16, 32].",
    )
    dilations: Annotated[
        tuple[Annotated[Positive, Field(le=16)], ...], Field(min_length=1, max_length=MAX_STAGES)
    ] = (1, 1, 1, 1)
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=MAX_STAGES)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")
    deploy: bool = Field(
        False, description="Blocks are one convolution, and so are their weights in the file."
    )
    add_ppf: bool = Field(False, description="Ends the last stage with a pyramid of max-pools.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        plan = self.plan()
        stages = len(plan.blocks)
        if len(plan.factors) != stages:
            yield "arch/width_factor", f"has {len(plan.factors)} entries for {stages} stages"
        strides = self.strides or ()
        if not self._asks_for_levels() and (max(strides, default=1) > 2 or len(strides) not in (0, stages)):
            yield (
                "strides",
                f"must be {stages} of 1 or 2 (strides of the stages), or all 4 and above (of the levels)",
            )
        if len(self.dilations) != stages:
            yield "dilations", f"has {len(self.dilations)} entries for {stages} stages"
        if self.frozen_stages > stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {stages} stages"
        if self.conv_cfg is not None and self.conv_cfg.type == "Conv2dAdaptivePadding":
            yield "conv_cfg/type", "only the plain convolution is served"
        spec = self.spec()
        if min(spec.stem(), *spec.widths()) < 2:
            yield "base_channels", "leaves a stage with fewer than 2 channels"
        for place in spec.places():
            if place.inputs % place.groups or place.outputs % place.groups:
                detail = f"{place.groups} groups do not divide {place.inputs} or {place.outputs} channels"
                yield "arch", detail
        if (fault := norm_fault(self.norm_cfg, (spec.stem(), *spec.widths()))) is not None:
            yield fault

    def plan(self) -> Plan:
        """The blocks of the stages."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()

    def _asks_for_levels(self) -> bool:
        return self.strides is not None and min(self.strides) >= 4

    def spec(self) -> RepVGGSpec:
        """The neutral spelling."""
        own = self.strides is not None and not self._asks_for_levels()
        return RepVGGSpec(
            self.plan(),
            self.norm_cfg.spec(),
            self.act_cfg.spec(),
            self.in_channels,
            self.base_channels,
            self.strides if own and self.strides is not None else (2,) * len(self.plan().blocks),
            self.dilations,
            self.deploy,
            self.add_ppf,
        )

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self._asks_for_levels() and self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)


TIMM_BRANCHES = {
    "branch_3x3.conv.{leaf}": "conv_kxk.conv.{leaf}",
    "branch_3x3.norm.{leaf}": "conv_kxk.bn.{leaf}",
    "branch_1x1.conv.{leaf}": "conv_1x1.conv.{leaf}",
    "branch_1x1.norm.{leaf}": "conv_1x1.bn.{leaf}",
    "branch_norm.{leaf}": "identity.{leaf}",
}
REPVGG_NAMES = Naming(
    "RepVGG",
    own=("mmpretrain",),
    marks=("stem.branch_3x3.conv.weight", "stage_1.0.branch_3x3.conv.weight", "stage_1.1.branch_norm.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    f"{ours}{branch}": f"{theirs}{named}"
                    for ours, theirs in {"stem.": "stem.", "stage_{s+1}.{b}.": "stages.{s}.{b}."}.items()
                    for branch, named in TIMM_BRANCHES.items()
                }
            ),
        ),
    ),
)


REPVGG = make_family(
    RepVGGConfig,
    RepVGG,
    example={"arch": "A0", "out_indices": [1, 2, 3]},
    architectures=tuple(ARCHS),
    naming=REPVGG_NAMES,
)
