"""RepVGG (Ding et al., arXiv:2101.03697) with mmpretrain's key names, as trained and as deployed."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels, Stride, levels_by_stride
from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
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
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level

SIGMOID = ActivationSpec("sigmoid")


@dataclass(frozen=True)
class Plan:
    """Blocks and factors of width of the stages; every second block of the network has `groups`."""

    blocks: tuple[int, ...]
    factors: tuple[float, ...]
    groups: int = 1
    squeeze_ratio: int | None = None
    stem: int | None = None


B_BLOCKS = (4, 6, 16, 1)
ARCHS: dict[str, Plan] = {
    "A0": Plan((2, 4, 14, 1), (0.75, 0.75, 0.75, 2.5)),
    "A1": Plan((2, 4, 14, 1), (1, 1, 1, 2.5)),
    "A2": Plan((2, 4, 14, 1), (1.5, 1.5, 1.5, 2.75)),
    "B0": Plan(B_BLOCKS, (1, 1, 1, 2.5), stem=64),
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
class RepVGGSpec:
    """What decides the numbers and the names of the weights; `deploy` blocks are one convolution."""

    plan: Plan
    norm: NormSpec
    activation: ActivationSpec
    in_channels: int = 3
    base: int = 64
    strides: tuple[int, ...] = (2, 2, 2, 2)
    dilations: tuple[int, ...] = (1, 1, 1, 1)
    deploy: bool = False

    def stem(self) -> int:
        """Channels of the stem."""
        return self.plan.stem or min(64, int(self.base * self.plan.factors[0]))

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(int(self.base * 2**i * factor) for i, factor in enumerate(self.plan.factors))

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage; the stem strides by 2."""
        strides = [2 * math.prod(self.strides[: stage + 1]) for stage in range(len(self.strides))]
        return map_features(self.widths(), strides)


class Block(nn.Module):
    """A 3x3, a 1x1 and, where the shapes allow it, an identity branch, each with its norm; or their sum as one.

    Keys `branch_norm`, `branch_3x3`, `branch_1x1`, or `branch_reparam`; `se_layer`.
    """

    def __init__(
        self, spec: RepVGGSpec, inputs: int, outputs: int, *, stride: int, dilation: int, groups: int
    ) -> None:
        super().__init__()
        self.deploy = spec.deploy
        if spec.deploy:
            self.branch_reparam = _wide(inputs, outputs, stride, dilation, groups, bias=True)
        else:
            straight = inputs == outputs and stride == 1
            self.branch_norm = make_norm(spec.norm, inputs) if straight else None
            self.branch_3x3 = _normed(_wide(inputs, outputs, stride, dilation, groups, bias=False), spec.norm)
            self.branch_1x1 = _normed(
                nn.Conv2d(inputs, outputs, 1, stride=stride, groups=groups, bias=False), spec.norm
            )
        ratio = spec.plan.squeeze_ratio
        self.se_layer = (
            SqueezeExcite(
                outputs, make_divisible(outputs // ratio, 1), first=ActivationSpec("relu"), gate=SIGMOID
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


def _wide(inputs: int, outputs: int, stride: int, dilation: int, groups: int, *, bias: bool) -> nn.Conv2d:
    return nn.Conv2d(
        inputs, outputs, 3, stride=stride, padding=dilation, dilation=dilation, groups=groups, bias=bias
    )


def _normed(convolution: nn.Conv2d, norm: NormSpec) -> nn.Sequential:
    return nn.Sequential(OrderedDict(conv=convolution, norm=make_norm(norm, convolution.out_channels)))


class RepVGG(Backbone):
    """A stem and four stages; keys `stem`, `stage_1`, …."""

    def __init__(self, spec: RepVGGSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.stem = Block(spec, spec.in_channels, spec.stem(), stride=2, dilation=1, groups=1)
        inputs, number = spec.stem(), 1
        for stage, width in enumerate(spec.widths()):
            blocks = []
            for position in range(spec.plan.blocks[stage]):
                groups = spec.plan.groups if number % 2 == 0 else 1
                stride = spec.strides[stage] if position == 0 else 1
                dilation = spec.dilations[stage]
                blocks.append(Block(spec, inputs, width, stride=stride, dilation=dilation, groups=groups))
                inputs, number = width, number + 1
            self.add_module(f"stage_{stage + 1}", nn.Sequential(*blocks))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.stem(images), {}
        for stage in range(deepest(nodes) + 1):
            maps = getattr(self, f"stage_{stage + 1}")(maps)
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is the stem, k adds `stage_1` to `stage_{k}`."""
        return frozen_by_stage(self, freeze, lambda k: ["stem", *(f"stage_{i + 1}" for i in range(k))])


# --- mmpretrain.RepVGG = mmcls.RepVGG -------------------------------------------------------------

Four = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=1, le=16)], ...], Field(min_length=4, max_length=4)
]


class RepVGGConfig(OpenMMLabConfig):
    """`mmpretrain.RepVGG`, which is also `mmcls.RepVGG`."""

    NETWORK: ClassVar[str] = "RepVGG"

    arch: Annotated[str, named_arch(ARCHS, fold=False)] = Field(json_schema_extra={"enum": list(ARCHS)})
    in_channels: InputChannels = 3
    base_channels: Annotated[int, Field(strict=True, ge=2, le=512)] = 64
    out_indices: Indices = Field((3,), description="Stages 0 to 3, at strides 4 to 32.")
    strides: tuple[Stride, ...] | None = Field(
        (2, 2, 2, 2),
        min_length=1,
        max_length=4,
        description="Strides of the stages (1 or 2 each, four of them); "
        "or, 4 and above, ask for maps by stride instead of by index: [8, 16, 32].",
    )
    dilations: Four = (1, 1, 1, 1)
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")
    deploy: bool = Field(
        False, description="Blocks are one convolution, and so are their weights in the file."
    )
    add_ppf: Literal[False] = False

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        strides = self.strides or ()
        if not self._asks_for_levels() and (max(strides, default=1) > 2 or len(strides) not in (0, 4)):
            yield (
                "strides",
                "must be four of 1 or 2 (strides of the stages), or all 4 and above (of the levels)",
            )
        if self.conv_cfg is not None and self.conv_cfg.type == "Conv2dAdaptivePadding":
            yield "conv_cfg/type", "only the plain convolution is served"
        if (fault := norm_fault(self.norm_cfg, (self.in_channels, *self.spec().widths()))) is not None:
            yield fault

    def _asks_for_levels(self) -> bool:
        return self.strides is not None and min(self.strides) >= 4

    def spec(self) -> RepVGGSpec:
        """The neutral spelling."""
        own = self.strides is not None and not self._asks_for_levels()
        return RepVGGSpec(
            ARCHS[self.arch],
            self.norm_cfg.spec(),
            self.act_cfg.spec(),
            self.in_channels,
            self.base_channels,
            self.strides if own and self.strides is not None else (2, 2, 2, 2),
            self.dilations,
            self.deploy,
        )

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self._asks_for_levels() and self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)


REPVGG = make_family(
    RepVGGConfig, RepVGG, example={"arch": "A0", "out_indices": [1, 2, 3]}, architectures=tuple(ARCHS)
)
