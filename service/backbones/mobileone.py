"""MobileOne (Vasu et al., arXiv:2206.04040) with mmpretrain's key names, as trained and as deployed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices, InputChannels
from service.backbones.inverted_residual import SqueezeSpec
from service.backbones.norms import NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
    OpenMMLabConfig,
    SamePadConv2d,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_activation,
    make_divisible,
    make_family,
    map_features,
    named_arch,
    norm_fault,
    pads_same,
)
from service.backbones.repvgg import normed
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

BASE_WIDTHS = (64, 128, 256, 512)
RELU, SIGMOID = ActivationSpec("relu"), ActivationSpec("sigmoid")


@dataclass(frozen=True)
class Plan:
    """Blocks of the stages, factors of their width, branches of their blocks, how many of the last are weighed."""

    blocks: tuple[int, ...]
    factors: tuple[float, ...]
    branches: tuple[int, ...]
    squeezed: tuple[int, ...] = (0, 0, 0, 0)

    def widths(self) -> tuple[int, ...]:
        """Channels of the stages."""
        return tuple(int(base * factor) for base, factor in zip(BASE_WIDTHS, self.factors, strict=True))

    def stem(self) -> int:
        """Channels of the stem."""
        return min(64, self.widths()[0])


BLOCKS, ONE = (2, 8, 10, 1), (1, 1, 1, 1)
ARCHS: dict[str, Plan] = {
    "s0": Plan(BLOCKS, (0.75, 1.0, 1.0, 2.0), (4, 4, 4, 4)),
    "s1": Plan(BLOCKS, (1.5, 1.5, 2.0, 2.5), ONE),
    "s2": Plan(BLOCKS, (1.5, 2.0, 2.5, 4.0), ONE),
    "s3": Plan(BLOCKS, (2.0, 2.5, 3.0, 4.0), ONE),
    "s4": Plan(BLOCKS, (3.0, 3.5, 3.5, 4.0), ONE, (0, 0, 5, 1)),
}


@dataclass(frozen=True)
class SqueezeRule:
    """How the squeeze-and-excite layers are made: inner channels as given, or by ratio and divisor."""

    hidden: int | None = None
    ratio: int = 16
    divisor: int = 8
    first: ActivationSpec = RELU
    gate: ActivationSpec = SIGMOID

    def spec(self, channels: int) -> SqueezeSpec:
        """The layer for so many channels."""
        hidden = self.hidden or make_divisible(channels // self.ratio, self.divisor)
        return SqueezeSpec(hidden, self.first, self.gate)


@dataclass(frozen=True)
class MobileOneSpec:
    """What decides the numbers and the names of the weights; `deploy` blocks are one convolution."""

    plan: Plan
    norm: NormSpec
    activation: ActivationSpec
    squeeze: SqueezeRule
    in_channels: int = 3
    deploy: bool = False
    same_pad: bool = False

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        return map_features(self.plan.widths(), (4, 8, 16, 32))


@dataclass(frozen=True)
class BlockSpec:
    """One block; `branches` are its parallel convolutions."""

    inputs: int
    outputs: int
    kernel: int
    stride: int = 1
    groups: int = 1
    branches: int = 1
    squeezes: bool = False


def convolution(spec: MobileOneSpec, block: BlockSpec, kernel: int, *, bias: bool) -> nn.Conv2d:
    """One of the parallel convolutions of a block."""
    return (SamePadConv2d if spec.same_pad else nn.Conv2d)(
        block.inputs,
        block.outputs,
        kernel,
        stride=block.stride,
        padding=0 if spec.same_pad else kernel // 2,
        groups=block.groups,
        bias=bias,
    )


class Block(nn.Module):
    """Parallel convolutions, a 1x1 and an identity, each with its norm, summed; or their sum as one convolution.

    Keys `se`, `branch_norm`, `branch_scale`, `branch_conv_list`, or `se`, `branch_reparam`.
    """

    def __init__(self, spec: MobileOneSpec, block: BlockSpec) -> None:
        super().__init__()
        self.deploy = spec.deploy
        self.se = spec.squeeze.spec(block.outputs).make(block.outputs) if block.squeezes else nn.Identity()
        if spec.deploy:
            self.branch_reparam = convolution(spec, block, block.kernel, bias=True)
        else:
            straight = block.inputs == block.outputs and block.stride == 1
            self.branch_norm = make_norm(spec.norm, block.inputs) if straight else None
            self.branch_scale = _branch(spec, block, 1) if block.kernel > 1 else None
            self.branch_conv_list = nn.ModuleList(
                _branch(spec, block, block.kernel) for _ in range(block.branches)
            )
        self.act = make_activation(spec.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        mixed = self.branch_reparam(maps) if self.deploy else self._branches(maps)
        activated: Tensor = self.act(self.se(mixed))
        return activated

    def _branches(self, maps: Tensor) -> Tensor:
        parts = [self.branch_norm, self.branch_scale, *self.branch_conv_list]
        first, *others = [part for part in parts if part is not None]
        mixed: Tensor = first(maps)
        for part in others:
            mixed = mixed + part(maps)
        return mixed


def _branch(spec: MobileOneSpec, block: BlockSpec, kernel: int) -> nn.Sequential:
    return normed(convolution(spec, block, kernel, bias=False), spec.norm)


def make_stage(spec: MobileOneSpec, inputs: int, stage: int) -> nn.Sequential:
    """Depthwise and pointwise blocks in turn; the last of them are weighed by squeeze-and-excite layers."""
    plan, outputs = spec.plan, spec.plan.widths()[stage]
    count, branches = plan.blocks[stage], plan.branches[stage]
    blocks = []
    for position in range(count):
        squeezes = position >= count - plan.squeezed[stage]
        stride = 2 if position == 0 else 1
        depthwise = BlockSpec(inputs, inputs, 3, stride, inputs, branches, squeezes)
        pointwise = BlockSpec(inputs, outputs, 1, branches=branches, squeezes=squeezes)
        blocks += [Block(spec, depthwise), Block(spec, pointwise)]
        inputs = outputs
    return nn.Sequential(*blocks)


class MobileOne(Backbone):
    """A stem, `stage0`, and four stages, `stage1`, …."""

    def __init__(self, spec: MobileOneSpec) -> None:
        super().__init__()
        self.features = spec.features()
        inputs = spec.plan.stem()
        self.stage0 = Block(spec, BlockSpec(spec.in_channels, inputs, 3, 2))
        for stage, width in enumerate(spec.plan.widths()):
            self.add_module(f"stage{stage + 1}", make_stage(spec, inputs, stage))
            inputs = width

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.stage0(images), {}
        for stage in range(deepest(nodes) + 1):
            maps = getattr(self, f"stage{stage + 1}")(maps)
            found[str(stage)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is `stage0`, k adds `stage1` to `stage{k}`."""
        return frozen_by_stage(self, freeze, lambda k: [f"stage{stage}" for stage in range(k + 1)])


# --- mmpretrain.MobileOne = mmcls.MobileOne -------------------------------------------------------

Four = Field(min_length=4, max_length=4)
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Branches = Annotated[int, Field(strict=True, ge=1, le=16)]
Squeezed = Annotated[int, Field(strict=True, ge=0, le=64)]
Factor = Annotated[float, Field(ge=0.05, le=16)]


class ArchConfig(BaseModel):
    """An `arch` spelled out, each for the four stages."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_blocks: Annotated[tuple[Count, ...], Four]
    width_factor: Annotated[tuple[Factor, ...], Four]
    num_conv_branches: Annotated[tuple[Branches, ...], Four]
    num_se_blocks: Annotated[tuple[Squeezed, ...], Four]

    def plan(self) -> Plan:
        """The neutral spelling."""
        return Plan(self.num_blocks, self.width_factor, self.num_conv_branches, self.num_se_blocks)


class SqueezeConfig(BaseModel):
    """mmpretrain's `se_cfg`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    squeeze_channels: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    ratio: Annotated[int, Field(strict=True, ge=1, le=1024)] = 16
    divisor: Annotated[int, Field(strict=True, ge=1, le=256)] = 8

    def rule(self) -> SqueezeRule:
        """The neutral spelling."""
        return SqueezeRule(self.squeeze_channels, self.ratio, self.divisor)


class MobileOneConfig(OpenMMLabConfig):
    """`mmpretrain.MobileOne`, which is also `mmcls.MobileOne`."""

    NETWORK: ClassVar[str] = "MobileOne"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ]
    in_channels: InputChannels = 3
    out_indices: Indices = Field((3,), description="Stages 0 to 3, at strides 4 to 32.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=4)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")
    se_cfg: SqueezeConfig | None = Field(
        SqueezeConfig(), description="Of the blocks that squeeze and excite; null takes it from them."
    )
    deploy: bool = Field(
        False, description="Blocks are one convolution, and so are their weights in the file."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        plan = self.plan()
        for stage, (count, squeezed) in enumerate(zip(plan.blocks, plan.squeezed, strict=True)):
            if squeezed > count:
                yield (
                    f"arch/num_se_blocks/{stage}",
                    f"{squeezed} is more than the {count} blocks of the stage",
                )
        widths = (plan.stem(), *plan.widths())
        if (fault := norm_fault(self.norm_cfg, widths)) is not None and not self.deploy:
            yield fault

    def plan(self) -> Plan:
        """`arch` spelled out."""
        plan = ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()
        return plan if self.se_cfg is not None else replace(plan, squeezed=(0, 0, 0, 0))

    def spec(self) -> MobileOneSpec:
        """The neutral spelling."""
        return MobileOneSpec(
            self.plan(),
            self.norm_cfg.spec(),
            self.act_cfg.spec(),
            (self.se_cfg or SqueezeConfig()).rule(),
            self.in_channels,
            self.deploy,
            pads_same(self.conv_cfg),
        )


_TIMM_BLOCK = {
    "branch_conv_list.{i}.conv.{leaf}": "conv_kxk.{i}.conv.{leaf}",
    "branch_conv_list.{i}.norm.{leaf}": "conv_kxk.{i}.bn.{leaf}",
    "branch_scale.conv.{leaf}": "conv_scale.conv.{leaf}",
    "branch_scale.norm.{leaf}": "conv_scale.bn.{leaf}",
    "branch_norm.{leaf}": "identity.{leaf}",
    "branch_reparam.{leaf}": "reparam_conv.{leaf}",
    "se.conv{k}.conv.{leaf}": "attn.fc{k}.{leaf}",
}
_OFFICIAL_BLOCK = {
    "branch_conv_list.{i}.conv.{leaf}": "rbr_conv.{i}.conv.{leaf}",
    "branch_conv_list.{i}.norm.{leaf}": "rbr_conv.{i}.bn.{leaf}",
    "branch_scale.conv.{leaf}": "rbr_scale.conv.{leaf}",
    "branch_scale.norm.{leaf}": "rbr_scale.bn.{leaf}",
    "branch_norm.{leaf}": "rbr_skip.{leaf}",
    "branch_reparam.{leaf}": "reparam_conv.{leaf}",
    "se.conv1.conv.{leaf}": "se.reduce.{leaf}",
    "se.conv2.conv.{leaf}": "se.expand.{leaf}",
}
MOBILEONE_NAMES = Naming(
    "MobileOne",
    own=("mmpretrain",),
    # as trained; a deployed one has one convolution for all of a block
    marks=(
        "stage0.branch_conv_list.0.conv.weight",
        "stage1.0.branch_conv_list.0.conv.weight",
        "stage4.0.branch_scale.conv.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    **below("stage0.", "stem.", _TIMM_BLOCK),
                    **below("stage{s+1}.{b}.", "stages.{s}.{b}.", _TIMM_BLOCK),
                }
            ),
        ),
        KeyLayout(
            "official",
            rules(
                {
                    **below("stage0.", "stage0.", _OFFICIAL_BLOCK),
                    **below("stage{s}.{b}.", "stage{s}.{b}.", _OFFICIAL_BLOCK),
                }
            ),
        ),
    ),
)


MOBILEONE = make_family(
    MobileOneConfig,
    MobileOne,
    example={"arch": "s0", "out_indices": [1, 2, 3]},
    architectures=tuple(ARCHS),
    naming=MOBILEONE_NAMES,
)
