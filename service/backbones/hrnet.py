"""HRNet (Wang et al., arXiv:1908.07919) with OpenMMLab's key names: branches at several strides, side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.base import Backbone, CheckpointName, InputChannels
from service.backbones.freezing import freeze_report
from service.backbones.mobilenet_v2 import weights_or_pretrained
from service.backbones.norms import BATCH_NORM, NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    PlainConvConfig,
    SharedConfig,
    batch_norm,
    make_family,
    map_features,
    named_arch,
    norm_fault,
)
from service.backbones.resnet import ResidualBlock
from service.checkpoints.layouts import Naming
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    WeightsRef,
)

BlockKind = Literal["BASIC", "BOTTLENECK"]
EXPANSIONS: dict[BlockKind, int] = {"BASIC": 1, "BOTTLENECK": 4}
STEM = 64


@dataclass(frozen=True)
class StageSpec:
    """One stage: `modules` exchanges between branches of `blocks` and `channels` (before expansion)."""

    modules: int
    block: BlockKind
    blocks: tuple[int, ...]
    channels: tuple[int, ...]

    def widths(self) -> tuple[int, ...]:
        """Channels of the branches."""
        return tuple(width * EXPANSIONS[self.block] for width in self.channels)


def _arch(width: int) -> tuple[StageSpec, ...]:
    widths = tuple(width * 2**branch for branch in range(4))
    return (
        StageSpec(1, "BOTTLENECK", (4,), (64,)),
        StageSpec(1, "BASIC", (4,) * 2, widths[:2]),
        StageSpec(4, "BASIC", (4,) * 3, widths[:3]),
        StageSpec(3, "BASIC", (4,) * 4, widths),
    )


ARCHS = {f"w{width}": _arch(width) for width in (18, 30, 32, 40, 44, 48, 64)}


@dataclass(frozen=True)
class HRNetSpec:
    """What decides the numbers and the names of the weights. `multiscale` is whether all branches go out.

    `first_norm` is that of the first stage, `layer1`; where it is None, as of all others.
    """

    stages: tuple[StageSpec, ...]
    norm: NormSpec
    in_channels: int = 3
    multiscale: bool = True
    first_norm: NormSpec | None = None

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a branch."""
        widths = self.stages[-1].widths()[: None if self.multiscale else 1]
        return map_features(widths, [4 * 2**branch for branch in range(len(widths))])


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def _step(
    norm: NormSpec, inputs: int, outputs: int, *, stride: int = 1, activates: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [_conv3x3(inputs, outputs, stride), make_norm(norm, outputs)]
    return nn.Sequential(*layers, *([nn.ReLU()] if activates else []))


def _residual(norm: NormSpec, kind: BlockKind, inputs: int, channels: int) -> ResidualBlock:
    outputs = channels * EXPANSIONS[kind]
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), make_norm(norm, outputs))
    if kind == "BASIC":
        return ResidualBlock([_conv3x3(inputs, channels), _conv3x3(channels, outputs)], norm, shortcut)
    first, last = nn.Conv2d(inputs, channels, 1, bias=False), nn.Conv2d(channels, outputs, 1, bias=False)
    return ResidualBlock([first, _conv3x3(channels, channels), last], norm, shortcut)


def _branch(norm: NormSpec, kind: BlockKind, inputs: int, channels: int, count: int) -> nn.Sequential:
    width = channels * EXPANSIONS[kind]
    sizes = [inputs, *(width for _ in range(count - 1))]
    return nn.Sequential(*(_residual(norm, kind, size, channels) for size in sizes))


class Exchange(nn.Module):
    """Branches, then each adds what the others have, brought to its size; keys `branches`, `fuse_layers`."""

    def __init__(self, norm: NormSpec, stage: StageSpec, inputs: Sequence[int], outputs: int) -> None:
        super().__init__()
        plan = zip(inputs, stage.channels, stage.blocks, strict=True)
        self.branches = nn.ModuleList(_branch(norm, stage.block, *sizes) for sizes in plan)
        widths = stage.widths()
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(_fuse(norm, widths, source, target) for source in range(len(widths)))
            for target in range(outputs)
        )

    def forward(self, maps: Sequence[Tensor], targets: Sequence[int] | None = None) -> list[Tensor]:
        """A map a branch to a map an output, or to the outputs in `targets` only."""
        maps = [branch(one) for branch, one in zip(self.branches, maps, strict=True)]
        return [self._fused(target, maps) for target in targets or range(len(self.fuse_layers))]

    def _fused(self, target: int, maps: Sequence[Tensor]) -> Tensor:
        size = maps[target].shape[-2:]
        layers = self.fuse_layers.get_submodule(str(target))
        total: Tensor | None = None
        for source, layer in enumerate(layers.children()):
            part = layer(maps[source])
            # Coarser branches are enlarged to the very size of this one, which an odd side makes less than twice.
            part = F.interpolate(part, size=size, mode="nearest") if source > target else part
            total = part if total is None else total + part
        return F.relu(total if total is not None else maps[target])


def _fuse(norm: NormSpec, widths: Sequence[int], source: int, target: int) -> nn.Module:
    """What brings a branch to the channels, and from a finer one also to the size, of another."""
    inputs, outputs = widths[source], widths[target]
    if source == target:
        return nn.Identity()
    if source > target:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), make_norm(norm, outputs))
    last = target - source - 1
    return nn.Sequential(
        *(
            _step(norm, inputs, outputs if i == last else inputs, stride=2, activates=i != last)
            for i in range(last + 1)
        )
    )


def _transition(norm: NormSpec, before: Sequence[int], after: Sequence[int]) -> nn.ModuleList:
    """What makes the branches of a stage of those before: others' channels, and new ones from the last."""
    made: list[nn.Module] = []
    for branch, width in enumerate(after):
        if branch < len(before):
            same = before[branch] == width
            made.append(nn.Identity() if same else _step(norm, before[branch], width))
            continue
        steps = branch + 1 - len(before)
        sizes = [before[-1]] * steps + [width]
        made.append(nn.Sequential(*(_step(norm, *sizes[i : i + 2], stride=2) for i in range(steps))))
    return nn.ModuleList(made)


class HRNet(Backbone):
    """A stem of stride 4, bottlenecks, then stages with one more branch each."""

    def __init__(self, spec: HRNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        norm = spec.norm
        self.configures_first = spec.first_norm is None
        self.norm_names = (f"{norm.kind}1", f"{norm.kind}2")
        for i, (inputs, name) in enumerate(
            zip((spec.in_channels, STEM), self.norm_names, strict=True), start=1
        ):
            self.add_module(f"conv{i}", _conv3x3(inputs, STEM, 2))
            self.add_module(name, make_norm(norm, STEM))
        first = spec.stages[0]
        first_norm = spec.first_norm or norm
        self.layer1 = _branch(first_norm, first.block, STEM, first.channels[0], first.blocks[0])
        before: Sequence[int] = first.widths()
        self.count = len(spec.stages)
        for number, stage in enumerate(spec.stages[1:], start=2):
            self.add_module(f"transition{number - 1}", _transition(norm, before, stage.widths()))
            self.add_module(f"stage{number}", self._stage(spec, stage, number))
            before = stage.widths()

    def _stage(self, spec: HRNetSpec, stage: StageSpec, number: int) -> nn.Sequential:
        branches = len(stage.channels)
        modules = []
        for position in range(stage.modules):
            is_end = number == self.count and position == stage.modules - 1
            outputs = 1 if is_end and not spec.multiscale else branches
            modules.append(Exchange(spec.norm, stage, stage.widths(), outputs))
        return nn.Sequential(*modules)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the branches in `nodes`."""
        maps = images
        for i, name in enumerate(self.norm_names, start=1):
            maps = F.relu(getattr(self, name)(getattr(self, f"conv{i}")(maps)))
        branches, wanted = [self.layer1(maps)], sorted({int(node) for node in nodes})
        for number in range(2, self.count + 1):
            transition = self.get_submodule(f"transition{number - 1}")
            branches = [
                step(branches[min(branch, len(branches) - 1)])
                for branch, step in enumerate(transition.children())
            ]
            *inner, last = self.get_submodule(f"stage{number}").children()
            for exchange in inner:
                branches = exchange(branches)
            branches = last(branches, wanted if number == self.count else None)
        return {str(index): branch for index, branch in zip(wanted, branches, strict=True)}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """HRNet has no `frozen_stages`; `norm_eval` holds, and `norm_cfg` where it reaches."""
        parts = [name for name, _ in self.named_children() if self.configures_first or name != "layer1"]
        return freeze_report(self, freeze, (), configured=parts)


# --- mmpretrain.HRNet, mmdet.HRNet ----------------------------------------------------------------

Count = Annotated[int, Field(strict=True, ge=1, le=16)]
Channels = Annotated[int, Field(strict=True, ge=1, le=1024)]


class StageConfig(BaseModel):
    """One stage of `extra`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_modules: Count
    num_branches: Annotated[int, Field(strict=True, ge=1, le=4)]
    block: BlockKind
    num_blocks: tuple[Count, ...] = Field(min_length=1, max_length=4)
    num_channels: tuple[Channels, ...] = Field(min_length=1, max_length=4)

    def spec(self) -> StageSpec:
        """The neutral spelling."""
        return StageSpec(self.num_modules, self.block, self.num_blocks, self.num_channels)


class ExtraConfig(BaseModel):
    """The stages spelled out; the first has one branch, each other one more than the one before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage1: StageConfig
    stage2: StageConfig
    stage3: StageConfig
    stage4: StageConfig

    def stages(self) -> tuple[StageConfig, ...]:
        """The stages in order."""
        return self.stage1, self.stage2, self.stage3, self.stage4


class HRNetConfig(SharedConfig):
    """`mmpretrain.HRNet`, which is also `mmcls.HRNet`. It gives all its branches, at strides 4 to 32."""

    NETWORK: ClassVar[str] = "HRNet"

    arch: Annotated[str, named_arch(ARCHS)] = Field("w32", json_schema_extra={"enum": list(ARCHS)})
    extra: ExtraConfig | None = Field(None, description="Stages spelled out, instead of arch.")
    in_channels: InputChannels = 3
    conv_cfg: PlainConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    multiscale_output: bool = Field(True, description="False returns the finest branch only.")
    zero_init_residual: bool = Field(False, description="Start of training; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for number, stage in enumerate(self.extra.stages() if self.extra else (), start=1):
            for key in ("num_blocks", "num_channels"):
                if len(getattr(stage, key)) != stage.num_branches:
                    yield f"extra/stage{number}/{key}", f"needs {stage.num_branches} entries, one a branch"
            if stage.num_branches != number:
                yield f"extra/stage{number}/num_branches", f"must be {number}"
        widths = {width for stage in self.spec().stages for width in (*stage.channels, *stage.widths())}
        if (fault := norm_fault(self.norm_cfg, (STEM, *sorted(widths)))) is not None:
            yield fault

    def spec(self) -> HRNetSpec:
        """The neutral spelling."""
        stages = tuple(stage.spec() for stage in self.extra.stages()) if self.extra else ARCHS[self.arch]
        return HRNetSpec(
            stages, self.norm_cfg.spec(), self.in_channels, self.multiscale_output, self.first_norm()
        )

    def first_norm(self) -> NormSpec | None:
        """mmpretrain does not hand `norm_cfg` to the first stage."""
        return BATCH_NORM

    def selected(self, description: Description) -> tuple[Level, ...]:
        """All branches."""
        return tuple(Level(info.index, str(info.index), info.node) for info in description.features)


class DetHRNetConfig(HRNetConfig):
    """`mmdet.HRNet`: stages always spelled out, norms in eval mode unless told otherwise."""

    extra: ExtraConfig = Field(description="The stages.")
    norm_eval: bool = Field(True, description="True keeps every batch norm in eval mode.")
    pretrained: CheckpointName | None = Field(None, description="mmdet's older spelling of init_cfg.")

    def first_norm(self) -> NormSpec | None:
        """mmdet does."""
        return None

    def weights(self) -> WeightsRef | None:
        """Where the weights come from."""
        return weights_or_pretrained(super().weights(), self.pretrained)


def _extra(arch: str) -> dict[str, Any]:
    return {
        f"stage{number}": {
            "num_modules": stage.modules,
            "num_branches": len(stage.channels),
            "block": stage.block,
            "num_blocks": list(stage.blocks),
            "num_channels": list(stage.channels),
        }
        for number, stage in enumerate(ARCHS[arch], start=1)
    }


HRNET_NAMES = Naming(
    "HRNet",
    own=("mmpretrain", "mmdet", "timm"),
    marks=("conv2.weight", "transition1.0.0.weight", "stage2.0.branches.0.0.conv1.weight"),
)


HRNET = make_family(
    HRNetConfig, HRNet, naming=HRNET_NAMES, example={"arch": "w18"}, architectures=tuple(ARCHS)
)
DET_HRNET = make_family(DetHRNetConfig, HRNet, naming=HRNET_NAMES, example={"extra": _extra("w18")})
