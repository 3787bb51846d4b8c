"""HourglassNet (CornerNet, arXiv:1603.06937) as mmdet has it: one map of stride 4 from each hourglass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from service.backbones import building
from service.backbones.base import Backbone, BackboneConfig, Family, Indices, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.norms import BATCH_NORM, NormConfig, NormSpec, make_norm
from service.backbones.openmmlab import (
    ActivationSpec,
    initialise,
    map_features,
    norm_fault,
)
from service.backbones.resnet import ResidualBlock, conv1x1, conv3x3
from service.backbones.yolo import PLAIN, ConvStyle
from service.checkpoints.load import load_strict
from service.config.spec import (
    Description,
    FeatureInfo,
    Freeze,
    FreezeReport,
    Level,
    LoadedKeys,
    WeightsRef,
)

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict


@dataclass(frozen=True)
class HourglassSpec:
    """What decides the numbers and the names of the weights.

    An hourglass halves its maps `depth` times; `widths` and `blocks` are of each size, the largest first.
    """

    depth: int
    stacks: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    output: int
    norm: NormSpec
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stack, all of one size."""
        return map_features((self.output,) * self.stacks, (4,) * self.stacks)


def residual(norm: NormSpec, inputs: int, outputs: int, stride: int = 1) -> ResidualBlock:
    """A basic block; its shortcut is projected where the shape changes."""
    projection: nn.Module | None = None
    if stride != 1 or inputs != outputs:
        projection = nn.Sequential(conv1x1(inputs, outputs, stride=stride), make_norm(norm, outputs))
    return ResidualBlock(
        [conv3x3(inputs, outputs, stride=stride), conv3x3(outputs, outputs)], norm, projection
    )


def residuals(norm: NormSpec, inputs: int, outputs: int, blocks: int, *, stride: int = 1) -> nn.Sequential:
    """Basic blocks of which the first changes the shape."""
    rest = (residual(norm, outputs, outputs) for _ in range(blocks - 1))
    return nn.Sequential(residual(norm, inputs, outputs, stride), *rest)


class Hourglass(nn.Module):
    """Maps beside their half-sized selves, which go through a smaller hourglass; keys `up1`, `low1` to `low3`.

    mmdet does not hand `norm_cfg` to it: its norms are always plain batch norms.
    """

    def __init__(self, spec: HourglassSpec, size: int = 0) -> None:
        super().__init__()
        norm, blocks = BATCH_NORM, spec.blocks[size]
        width, inner = spec.widths[size], spec.widths[size + 1]
        self.up1 = residuals(norm, width, width, blocks)
        self.low1 = residuals(norm, width, inner, blocks, stride=2)
        if size + 1 < spec.depth:
            self.low2: nn.Module = Hourglass(spec, size + 1)
        else:
            self.low2 = residuals(norm, inner, inner, spec.blocks[size + 1])
        before = (residual(norm, inner, inner) for _ in range(blocks - 1))
        self.low3 = nn.Sequential(*before, residual(norm, inner, width))

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        beside: Tensor = self.up1(maps)
        small = self.low3(self.low2(self.low1(maps)))
        return beside + nn.functional.interpolate(small, size=beside.shape[2:])


class HourglassNet(Backbone):
    """Hourglasses behind each other, with mmdet's keys; a node is the index of an hourglass."""

    def __init__(self, spec: HourglassSpec) -> None:
        super().__init__()
        self.features = spec.features()
        width, between = spec.widths[0], spec.stacks - 1
        style = ConvStyle(spec.norm, ActivationSpec("relu"))
        linear = ConvStyle(spec.norm, PLAIN)
        self.stem = nn.Sequential(
            style.conv(spec.in_channels, width // 2, 7, stride=2),
            residuals(spec.norm, width // 2, width, 1, stride=2),
        )
        self.hourglass_modules = nn.ModuleList(Hourglass(spec) for _ in range(spec.stacks))
        # mmdet makes one of these where it needs none, too.
        self.inters = residuals(spec.norm, width, width, max(between, 1))
        self.conv1x1s = nn.ModuleList(linear.conv(width, width) for _ in range(between))
        self.out_convs = nn.ModuleList(style.conv(width, spec.output, 3) for _ in range(spec.stacks))
        self.remap_convs = nn.ModuleList(linear.conv(spec.output, width) for _ in range(between))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the hourglasses in `nodes`; stops after the deepest of them."""
        last = max(int(node) for node in nodes)
        maps, found = self.stem(images), {}
        for stack in range(last + 1):
            output = self.out_convs[stack](self.hourglass_modules[stack](maps))
            found[str(stack)] = output
            if stack < last:
                merged = self.conv1x1s[stack](maps) + self.remap_convs[stack](output)
                maps = self.inters[stack](torch.relu_(merged))
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing but the norms that follow `norm_cfg`, if it says so."""
        configured = [name for name, _ in self.named_children() if name != "hourglass_modules"]
        return freeze_report(self, freeze, (), configured=configured)


# --- mmdet.HourglassNet ---------------------------------------------------------------------------

Width = Annotated[int, Field(strict=True, ge=2, le=1024)]
BlockCount = Annotated[int, Field(strict=True, ge=1, le=8)]


class HourglassConfig(BackboneConfig):
    """`mmdet.HourglassNet`."""

    VIEW = BackboneConfig.VIEW | {"out_indices"}

    downsample_times: Annotated[int, Field(strict=True, ge=1, le=7)] = Field(
        5, description="How often an hourglass halves its maps."
    )
    num_stacks: Annotated[int, Field(strict=True, ge=1, le=4)] = Field(2, description="How many hourglasses.")
    stage_channels: Annotated[tuple[Width, ...], Field(min_length=2, max_length=8)] = Field(
        (256, 256, 384, 384, 384, 512), description="Channels of each size of maps, the largest first."
    )
    stage_blocks: Annotated[tuple[BlockCount, ...], Field(min_length=2, max_length=8)] = Field(
        (2, 2, 2, 2, 2, 4), description="Blocks of each size of maps."
    )
    feat_channel: Width = Field(256, description="Channels of each level.")
    norm_cfg: NormConfig = NormConfig(type="BN")
    out_indices: Indices | None = Field(None, description="Which hourglasses, counted from 0; null is all.")

    def spec(self) -> HourglassSpec:
        """The neutral spelling."""
        used = self.downsample_times + 1
        return HourglassSpec(
            depth=self.downsample_times,
            stacks=self.num_stacks,
            widths=self.stage_channels[:used],
            blocks=self.stage_blocks[:used],
            output=self.feat_channel,
            norm=self.norm_cfg.spec(),
        )

    def architecture(self) -> dict[str, Any]:
        """The neutral spelling, so that what only training or the reply reads makes no second model."""
        return {"type": "HourglassNet", **asdict(self.spec())}

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        sizes = len(self.stage_channels)
        if len(self.stage_blocks) != sizes:
            yield "stage_blocks", f"has {len(self.stage_blocks)} entries for {sizes} stage_channels"
        if self.downsample_times >= sizes:
            yield "downsample_times", f"{self.downsample_times} needs as many stage_channels and one more"
        widths = (self.stage_channels[0], self.stage_channels[0] // 2, self.feat_channel)
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def freeze(self) -> Freeze:
        """`norm_cfg.requires_grad`; there are no frozen stages."""
        return Freeze(all_norms=not self.norm_cfg.requires_grad)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """One level a stack, or those of `out_indices`."""
        return levels_by_index(self.out_indices or range(self.num_stacks), description.features)


def _describe(config: HourglassConfig) -> Description:
    return building.describe(lambda: HourglassNet(config.spec()), in_channels=3)


def _build(config: HourglassConfig) -> HourglassNet:
    network = building.unset(lambda: HourglassNet(config.spec()))
    initialise(network)
    return network


def _load(config: HourglassConfig, state: StateDict, ref: WeightsRef) -> tuple[HourglassNet, LoadedKeys]:
    network = building.unset(lambda: HourglassNet(config.spec()))
    return network, load_strict(network, state, ref)


HOURGLASS: Family[HourglassConfig] = Family(
    config=HourglassConfig,
    describe=_describe,
    build=_build,
    load=_load,
    example=lambda type_name: {"type": type_name, "num_stacks": 1},
)
