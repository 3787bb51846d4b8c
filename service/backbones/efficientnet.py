"""EfficientNet (Tan and Le, arXiv:1905.11946) with OpenMMLab's key names: b0 to b8, l2, and the EdgeTPU variants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices
from service.backbones.inverted_residual import (
    BlockSpec,
    ConvSpec,
    EdgeResidual,
    InvertedResidual,
    SqueezeSpec,
    conv,
    counted_through,
    not_tensorflows,
    stage_lengths,
    timm_block_rules,
)
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_divisible,
    make_family,
    map_features,
    named_arch,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, rules
from service.checkpoints.read import StateDict
from service.config.spec import FeatureInfo, Freeze, FreezeReport

SIGMOID = ActivationSpec("sigmoid")
BlockKind = Literal["inverted", "edge"]


@dataclass(frozen=True)
class Row:
    """Equal blocks: the first strides; `squeeze` is the ratio of squeeze-and-excite to the input, 0 for none."""

    count: int
    kernel: int
    outputs: int
    stride: int
    expand: int
    squeeze: int
    kind: BlockKind = "inverted"


# The rows of the paper; a row of stride 1 after the first joins the level before it.
BASE = (
    Row(1, 3, 16, 1, 1, 4),
    Row(2, 3, 24, 2, 6, 4),
    Row(2, 5, 40, 2, 6, 4),
    Row(3, 3, 80, 2, 6, 4),
    Row(3, 5, 112, 1, 6, 4),
    Row(4, 5, 192, 2, 6, 4),
    Row(1, 3, 320, 1, 6, 4),
)
EDGE = (
    Row(1, 3, 24, 1, 3, 0, "edge"),
    Row(2, 3, 32, 2, 8, 0, "edge"),
    Row(4, 3, 48, 2, 8, 0, "edge"),
    Row(5, 5, 96, 2, 8, 0),
    Row(4, 5, 144, 1, 8, 0),
    Row(2, 5, 192, 2, 8, 0),
)
# factors of width and depth, pixels of the images that it was trained on
ARCHS: dict[str, tuple[float, float, int]] = {
    "b0": (1.0, 1.0, 224),
    "b1": (1.0, 1.1, 240),
    "b2": (1.1, 1.2, 260),
    "b3": (1.2, 1.4, 300),
    "b4": (1.4, 1.8, 380),
    "b5": (1.6, 2.2, 456),
    "b6": (1.8, 2.6, 528),
    "b7": (2.0, 3.1, 600),
    "b8": (2.2, 3.6, 672),
    "l2": (4.3, 5.3, 800),
    "es": (1.0, 1.0, 224),
    "em": (1.0, 1.1, 240),
    "el": (1.2, 1.4, 300),
}
LEVELS = 7


@dataclass(frozen=True)
class EfficientNetSpec:
    """What decides the numbers and the names of the weights. `levels` is how many are built, from the stem on."""

    arch: str
    conv: ConvSpec
    levels: int = LEVELS
    in_channels: int = 3

    def stem_width(self) -> int:
        """Channels of the stem."""
        return make_divisible(32 * ARCHS[self.arch][0], 8)

    def rows(self) -> list[list[Row]]:
        """The rows of levels 1 to 5, scaled."""
        width, depth, _ = ARCHS[self.arch]
        found: list[list[Row]] = []
        for row in EDGE if self.arch.startswith("e") else BASE:
            outputs = make_divisible(row.outputs * width, 8)
            scaled = replace(row, count=math.ceil(depth * row.count), outputs=outputs)
            joins = row.stride == 1 and found
            found[-1].append(scaled) if joins else found.append([scaled])
        return found

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a level: the stem, five levels of blocks, the last convolution."""
        width = ARCHS[self.arch][0]
        levels = self.rows()
        channels = (
            self.stem_width(),
            *(rows[-1].outputs for rows in levels),
            make_divisible(1280 * width, 8),
        )
        steps = (2, *(rows[0].stride for rows in levels), 1)
        strides = tuple(itertools.accumulate(steps, lambda a, b: a * b))
        return map_features(channels, strides)[: self.levels]


BLOCKS = {"inverted": InvertedResidual, "edge": EdgeResidual}


def _level(spec: EfficientNetSpec, inputs: int, rows: Sequence[Row]) -> nn.Sequential:
    blocks: list[nn.Module] = []
    for row in rows:
        for position in range(row.count):
            # OpenMMLab widens the later blocks of the first EdgeTPU row, and gives them no shortcut.
            widened = row.kind == "edge" and row.expand == 3 and position > 0
            hidden = inputs * (4 if widened else row.expand)
            squeeze = (
                SqueezeSpec(hidden // (row.expand * row.squeeze), spec.conv.activation, SIGMOID)
                if row.squeeze
                else None
            )
            stride = row.stride if position == 0 else 1
            block = BlockSpec(inputs, row.outputs, hidden, row.kernel, stride, squeeze, residual=not widened)
            blocks.append(BLOCKS[row.kind](spec.conv, block))
            inputs = row.outputs
    return nn.Sequential(*blocks)


class EfficientNet(Backbone):
    """`layers.0` is the stem, 1 to 5 the blocks by stride, 6 the last convolution."""

    def __init__(self, spec: EfficientNetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        width = spec.stem_width()
        layers: list[nn.Module] = [conv(spec.conv, spec.in_channels, width, 3, stride=2)]
        for rows in spec.rows()[: spec.levels - 1]:
            layers.append(_level(spec, width, rows))
            width = rows[-1].outputs
        if spec.levels == LEVELS:
            layers.append(conv(spec.conv, width, self.features[-1].channels, 1))
        self.layers = nn.ModuleList(layers)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the levels in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for index in range(deepest(nodes) + 1):
            maps = self.layers[index](maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """OpenMMLab's rule: k is `layers.0` to `layers.{k - 1}`, 0 nothing."""
        return frozen_by_stage(self, freeze, lambda k: [f"layers.{index}" for index in range(k)])


# --- mmpretrain.EfficientNet, mmdet.EfficientNet --------------------------------------------------


class EfficientNetConfig(OpenMMLabConfig):
    """`mmpretrain.EfficientNet`, which is also `mmcls.EfficientNet`."""

    NETWORK: ClassVar[str] = "EfficientNet"

    arch: Annotated[str, named_arch(ARCHS, fold=False)] = Field("b0", json_schema_extra={"enum": list(ARCHS)})
    out_indices: Indices = Field(
        (6,), description="0 the stem, 1 to 5 the blocks at strides 2 to 32, 6 the last convolution."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=0, le=LEVELS)] = Field(
        0, description="0 nothing, k the stem and the levels below k: layers.0 to layers.k-1."
    )
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    conv_cfg: ConvConfig | None = ConvConfig(type="Conv2dAdaptivePadding")
    norm_cfg: NormConfig = batch_norm(1e-3)
    act_cfg: ActivationConfig = ActivationConfig(type="Swish")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        if self.frozen_stages > spec.levels:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {spec.levels} levels"
        widths = [feature.channels for feature in spec.features()]
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def levels_built(self) -> int:
        """How many levels the library builds."""
        return LEVELS

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:  # noqa: ARG002 - see below
        """timm has every one of these twice, under the same names in the file."""
        return not_tensorflows(checkpoint) if library == "timm" else None

    def spec(self) -> EfficientNetSpec:
        """The neutral spelling."""
        layers = ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec(), pads_same(self.conv_cfg))
        return EfficientNetSpec(self.arch, layers, self.levels_built())


class DetEfficientNetConfig(EfficientNetConfig):
    """`mmdet.EfficientNet`: the same, built no deeper than the deepest of `out_indices`."""

    def levels_built(self) -> int:
        """One more than the deepest index; all of them where levels are asked for otherwise."""
        if self.strides is not None:
            return LEVELS
        return min(max(index if index >= 0 else LEVELS + index for index in self.out_indices), LEVELS - 1) + 1


def _example(index: int) -> dict[str, Any]:
    return {"arch": "b0", "out_indices": [3, 4, index]}


def _timm_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    """timm has a stage for each width, here those of one stride are one: the 4th and 5th, the 6th and 7th."""
    if ours:
        lengths = stage_lengths(names, r"layers\.(\d+)\.(\d+)\.")
        first, second, third, fourth, sixth = (*lengths, 0, 0, 0, 0, 0)[:5]
        # The first and the last stage are equally deep, so are the 4th and 5th, in every published scaling.
        theirs = [first, second, third, fourth // 2, fourth - fourth // 2, sixth - first, first]
    else:
        theirs = stage_lengths(names, r"blocks\.(\d+)\.(\d+)\.")
        lengths = [*theirs[:3], sum(theirs[3:5]), sum(theirs[5:])]
    pairs = zip(counted_through(lengths, 1, "layers."), counted_through(theirs, 0, "blocks."), strict=False)
    return (
        *rules(
            {
                "layers.0.conv.{leaf}": "conv_stem.{leaf}",
                "layers.0.bn.{leaf}": "bn1.{leaf}",
                "layers.6.conv.{leaf}": "conv_head.{leaf}",
                "layers.6.bn.{leaf}": "bn2.{leaf}",
            }
        ),
        *timm_block_rules(pairs, names, ours=ours),
    )


EFFICIENTNET_NAMES = Naming(
    "EfficientNet",
    own=("mmpretrain", "mmdet"),
    marks=(
        "layers.0.conv.weight",
        "layers.1.0.depthwise_conv.conv.weight",
        # MobileNetV3, which timm names alike, has none there
        "layers.2.0.se.conv1.conv.weight",
        "layers.5.0.expand_conv.conv.weight",
    ),
    layouts=(KeyLayout("timm", _timm_rules),),
)


EFFICIENTNET = make_family(
    EfficientNetConfig,
    EfficientNet,
    naming=EFFICIENTNET_NAMES,
    example=_example(5),
    architectures=tuple(ARCHS),
)
DET_EFFICIENTNET = make_family(
    DetEfficientNetConfig,
    EfficientNet,
    example=_example(5),
    architectures=tuple(ARCHS),
    naming=EFFICIENTNET_NAMES,
)
