"""RepLKNet (Ding et al., arXiv:2203.06717) with mmpretrain's key names, as trained and with merged kernels."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels, Stride, levels_by_stride
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ConvConfig,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    named_arch,
)
from service.backbones.output_norms import asked_stages
from service.checkpoints.layouts import KeyLayout, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

STAGE_NORM = re.compile(r"(?:.*\.)?stages\.(\d+)\.norm\.\w+")


@dataclass(frozen=True)
class Plan:
    """Large kernels, pairs of blocks and channels of the stages; the small kernel beside each large one.

    `ratio` is the inner width of a large kernel's block over its channels.
    """

    kernels: tuple[int, ...]
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    small_kernel: int | None = 5
    ratio: float = 1.0


BLOCKS = (2, 2, 18, 2)
ARCHS: dict[str, Plan] = {
    "31B": Plan((31, 29, 27, 13), BLOCKS, (128, 256, 512, 1024)),
    "31L": Plan((31, 29, 27, 13), BLOCKS, (192, 384, 768, 1536)),
    "XL": Plan((27, 27, 27, 13), BLOCKS, (256, 512, 1024, 2048), None, 1.5),
}


@dataclass(frozen=True)
class RepLKNetSpec:
    """What decides the numbers and the names of the weights. `outputs` are the stages with an output norm."""

    plan: Plan
    outputs: tuple[int, ...] = ()
    in_channels: int = 3
    ffn_ratio: float = 4.0
    merged: bool = False

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage."""
        widths = self.plan.widths
        return map_features(widths, [4 * 2**stage for stage in range(len(widths))])


def conv_norm(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1, relu: bool = False
) -> nn.Sequential:
    """A convolution and its batch norm, which no `norm_cfg` reaches; keys `conv`, `bn`."""
    convolution = nn.Conv2d(
        inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv=convolution, bn=nn.BatchNorm2d(outputs))
    return nn.Sequential(layers | OrderedDict(nonlinear=nn.ReLU()) if relu else layers)


class LargeKernel(nn.Module):
    """A large and a small depthwise convolution, summed; keys `lkb_origin`, `small_conv`, or `lkb_reparam`."""

    def __init__(self, spec: RepLKNetSpec, width: int, kernel: int) -> None:
        super().__init__()
        self.merged, small = spec.merged, spec.plan.small_kernel
        self.small_conv: nn.Module | None = None
        if spec.merged:
            self.lkb_reparam = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        else:
            self.lkb_origin = conv_norm(width, width, kernel, groups=width)
            self.small_conv = None if small is None else conv_norm(width, width, small, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        filtered: Tensor = self.lkb_reparam(maps) if self.merged else self.lkb_origin(maps)
        return filtered if self.small_conv is None else filtered + self.small_conv(maps)


class KernelBlock(nn.Module):
    """A large kernel between two 1x1 convolutions; keys `pw1`, `pw2`, `large_kernel`, `prelkb_bn`."""

    def __init__(self, spec: RepLKNetSpec, stage: int) -> None:
        super().__init__()
        width = spec.plan.widths[stage]
        inner = int(width * spec.plan.ratio)
        self.pw1 = conv_norm(width, inner, 1, relu=True)
        self.pw2 = conv_norm(inner, width, 1)
        self.large_kernel = LargeKernel(spec, inner, spec.plan.kernels[stage])
        self.lk_nonlinear = nn.ReLU()
        self.prelkb_bn = nn.BatchNorm2d(width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        filtered = self.large_kernel(self.pw1(self.prelkb_bn(maps)))
        mixed: Tensor = maps + self.pw2(self.lk_nonlinear(filtered))
        return mixed


class ConvFeedForward(nn.Module):
    """Two 1x1 convolutions; keys `preffn_bn`, `pw1`, `pw2`."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.preffn_bn = nn.BatchNorm2d(width)
        self.pw1 = conv_norm(width, hidden, 1)
        self.pw2 = conv_norm(hidden, width, 1)
        self.nonlinear = nn.GELU()

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        mixed: Tensor = maps + self.pw2(self.nonlinear(self.pw1(self.preffn_bn(maps))))
        return mixed


class Stage(nn.Module):
    """Large kernels and feed-forward networks in turn; keys `blocks` and, where it is an output, `norm`."""

    def __init__(self, spec: RepLKNetSpec, stage: int) -> None:
        super().__init__()
        width, blocks = spec.plan.widths[stage], nn.ModuleList()
        for _ in range(spec.plan.blocks[stage]):
            blocks.append(KernelBlock(spec, stage))
            blocks.append(ConvFeedForward(width, int(width * spec.ffn_ratio)))
        self.blocks = blocks
        self.norm = nn.BatchNorm2d(width) if stage in spec.outputs else nn.Identity()

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """[n, c, h, w] to the map that goes on, and normed as an output."""
        for block in self.blocks:
            maps = block(maps)
        return maps, self.norm(maps)


class RepLKNet(Backbone):
    """Keys `stem`, `stages`, `transitions`."""

    def __init__(self, spec: RepLKNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        widths = spec.plan.widths
        first = widths[0]
        self.stem = nn.ModuleList(
            (
                conv_norm(spec.in_channels, first, 3, stride=2, relu=True),
                conv_norm(first, first, 3, groups=first, relu=True),
                conv_norm(first, first, 1, relu=True),
                conv_norm(first, first, 3, stride=2, groups=first, relu=True),
            )
        )
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in range(len(widths)))
        self.transitions = nn.ModuleList(
            nn.Sequential(
                conv_norm(inputs, outputs, 1, relu=True),
                conv_norm(outputs, outputs, 3, stride=2, groups=outputs, relu=True),
            )
            for inputs, outputs in pairwise(widths)
        )

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for layer in self.stem:
            maps = layer(maps)
        for stage in range(deepest(nodes) + 1):
            before = maps if stage == 0 else self.transitions[stage - 1](maps)
            maps, found[str(stage)] = self.stages[stage](before)
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return frozenset(name for name in self.state_dict() if STAGE_NORM.fullmatch(name) is None)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is `stem`, k adds `stages.0` to `stages.{k - 1}`; transitions are never frozen."""
        return frozen_by_stage(self, freeze, lambda k: ["stem", *(f"stages.{stage}" for stage in range(k))])


# --- mmpretrain.RepLKNet = mmcls.RepLKNet ---------------------------------------------------------

MAX_STAGES = 6
Kernel = Annotated[int, Field(strict=True, ge=1, le=63)]
Count = Annotated[int, Field(strict=True, ge=1, le=64)]
Width = Annotated[int, Field(strict=True, ge=1, le=4096)]
Ratio = Annotated[float, Field(ge=0.25, le=16)]
Stages = Field(min_length=1, max_length=MAX_STAGES)


class ArchConfig(BaseModel):
    """An `arch` spelled out; kernels are odd."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    large_kernel_sizes: Annotated[tuple[Kernel, ...], Stages]
    layers: Annotated[tuple[Count, ...], Stages]
    channels: Annotated[tuple[Width, ...], Stages]
    small_kernel: Kernel | None
    dw_ratio: Ratio

    def plan(self) -> Plan:
        """The neutral spelling."""
        sizes, widths = self.large_kernel_sizes, self.channels
        return Plan(sizes, self.layers, widths, self.small_kernel, self.dw_ratio)


class RepLKNetConfig(OpenMMLabConfig):
    """`mmpretrain.RepLKNet`, which is also `mmcls.RepLKNet`.

    `dilations`, `conv_cfg`, `norm_cfg`, `act_cfg` and `norm_intermediate_features` change nothing in the library
    either: it checks how many `strides` and `dilations` there are.
    """

    NETWORK: ClassVar[str] = "RepLKNet"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS, fold=False), Field(json_schema_extra={"examples": list(ARCHS)})
    ]
    in_channels: InputChannels = 3
    ffn_ratio: Ratio = 4
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4; each has a norm of its own.")
    strides: tuple[Stride, ...] | None = Field(
        (2, 2, 2, 2),
        min_length=1,
        max_length=MAX_STAGES,
        description="One a stage, 1 or 2, which changes nothing; "
        "or, 4 and above, ask for maps by stride instead of by index: [8, 16, 32].",
    )
    dilations: Annotated[tuple[Count, ...], Stages] = Field((1, 1, 1, 1), description="Changes nothing.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=MAX_STAGES)] = Field(
        -1, description="-1 nothing, 0 the stem, k the stem and k stages; what is between them, never."
    )
    conv_cfg: ConvConfig | None = Field(None, description="Changes nothing.")
    norm_cfg: NormConfig = Field(batch_norm(), description="Changes nothing.")
    act_cfg: ActivationConfig = Field(ActivationConfig(type="ReLU"), description="Changes nothing.")
    drop_path_rate: DropRate = Field(0.3, description="Training only; changes nothing here.")
    small_kernel_merged: bool = Field(
        False, description="The small kernels are in the large ones, and so are their weights in the file."
    )
    norm_intermediate_features: bool = Field(False, description="Changes nothing: every output has a norm.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        plan = self.plan()
        stages = len(plan.widths)
        for key, given in (("arch/layers", plan.blocks), ("arch/large_kernel_sizes", plan.kernels)):
            if len(given) != stages:
                yield key, f"has {len(given)} entries for {stages} stages"
        if len(self.dilations) != stages:
            yield "dilations", f"has {len(self.dilations)} entries for {stages} stages"
        strides = self.strides or ()
        if strides and not self._asks_for_levels() and (max(strides) > 2 or len(strides) != stages):
            yield "strides", f"must be {stages} of 1 or 2 (one a stage), or all 4 and above (of the levels)"
        yield from kernel_faults(plan)
        if self.frozen_stages > stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {stages} stages"

    def _asks_for_levels(self) -> bool:
        return self.strides is not None and min(self.strides) >= 4

    def plan(self) -> Plan:
        """`arch` spelled out."""
        return ARCHS[self.arch] if isinstance(self.arch, str) else self.arch.plan()

    def spec(self) -> RepLKNetSpec:
        """The neutral spelling."""
        plan, strides = self.plan(), self.strides if self._asks_for_levels() else None
        outputs = asked_stages(self.out_indices, strides, [4 * 2**i for i in range(len(plan.widths))])
        return RepLKNetSpec(plan, outputs, self.in_channels, self.ffn_ratio, self.small_kernel_merged)

    def freeze(self) -> Freeze:
        """mmpretrain's `frozen_stages` and `norm_eval`; `norm_cfg` reaches no norm."""
        stages = self.frozen_stages if self.frozen_stages >= 0 else None
        return Freeze(stages, norm_eval=self.norm_eval)

    def levels(self, description: Description) -> tuple[Level, ...]:
        """The levels to return: by `strides` where those are strides of levels, else by `out_indices`."""
        if self._asks_for_levels() and self.strides is not None:
            return levels_by_stride(self.strides, description.features)
        return self.selected(description)


def kernel_faults(plan: Plan) -> Iterator[tuple[str, str]]:
    """Even kernels, which would change the size of a map, and small ones that are not: (key, detail)."""
    small = plan.small_kernel
    if any(kernel % 2 == 0 for kernel in plan.kernels):
        yield "arch/large_kernel_sizes", "must be odd"
    if small is not None and (small % 2 == 0 or small > min(plan.kernels)):
        yield "arch/small_kernel", f"{small} is not odd or larger than {min(plan.kernels)}"


def may_lack_stage_norms(config: RepLKNetConfig, state: StateDict) -> Callable[[str], bool]:
    """A classifier's file has the output norm of the last stage only; those before it start at 1 and 0."""
    last = len(config.plan().widths) - 1
    in_file = {int(match[1]) for name in state if (match := STAGE_NORM.fullmatch(name))}
    has_early = any(stage != last for stage in in_file)

    def optional(name: str) -> bool:
        match = STAGE_NORM.fullmatch(name)
        return match is not None and not has_early and int(match[1]) != last

    return optional


REPLKNET_NAMES = Naming(
    "RepLKNet",
    own=("mmpretrain",),
    marks=("stem.0.conv.weight", "stages.0.blocks.0.pw1.conv.weight", "stages.0.blocks.0.prelkb_bn.weight"),
    layouts=(
        KeyLayout(
            "official",
            rules(
                {
                    "stages.3.norm.{leaf}": "norm.{leaf}",
                    **{f"{part}.{{rest}}": f"{part}.{{rest}}" for part in ("stem", "stages", "transitions")},
                }
            ),
        ),
    ),
)


REPLKNET = make_family(
    RepLKNetConfig,
    RepLKNet,
    example={"arch": "31B", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    optional=may_lack_stage_norms,
    naming=REPLKNET_NAMES,
)
