"""MobileNetV3 (Howard et al., arXiv:1905.02244) with mmpretrain's key names."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from service.backbones.base import Backbone, Indices
from service.backbones.inverted_residual import (
    BlockSpec,
    ConvSpec,
    InvertedResidual,
    SqueezeSpec,
    conv,
    counted_through,
    timm_block_rules,
)
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
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
from service.config.spec import FeatureInfo, Freeze, FreezeReport

RELU, HARDSWISH, GATE = ActivationSpec("relu"), ActivationSpec("hardswish"), ActivationSpec("hard_sigmoid")
STEM_WIDTH = 16


class Row(NamedTuple):
    """One block of the paper's tables."""

    kernel: int
    hidden: int
    outputs: int
    squeezes: bool
    activation: ActivationSpec
    stride: int


def _rows(hidden: Sequence[int], outputs: Sequence[int], plan: Sequence[Row]) -> tuple[Row, ...]:
    """A plan of blocks with other widths."""
    widths = zip(plan, hidden, outputs, strict=True)
    return tuple(row._replace(hidden=inner, outputs=outer) for row, inner, outer in widths)


SMALL = (
    Row(3, 16, 16, True, RELU, 2),
    Row(3, 72, 24, False, RELU, 2),
    Row(3, 88, 24, False, RELU, 1),
    Row(5, 96, 40, True, HARDSWISH, 2),
    Row(5, 240, 40, True, HARDSWISH, 1),
    Row(5, 240, 40, True, HARDSWISH, 1),
    Row(5, 120, 48, True, HARDSWISH, 1),
    Row(5, 144, 48, True, HARDSWISH, 1),
    Row(5, 288, 96, True, HARDSWISH, 2),
    Row(5, 576, 96, True, HARDSWISH, 1),
    Row(5, 576, 96, True, HARDSWISH, 1),
)
LARGE = (
    Row(3, 16, 16, False, RELU, 1),
    Row(3, 64, 24, False, RELU, 2),
    Row(3, 72, 24, False, RELU, 1),
    Row(5, 72, 40, True, RELU, 2),
    Row(5, 120, 40, True, RELU, 1),
    Row(5, 120, 40, True, RELU, 1),
    Row(3, 240, 80, False, HARDSWISH, 2),
    Row(3, 200, 80, False, HARDSWISH, 1),
    Row(3, 184, 80, False, HARDSWISH, 1),
    Row(3, 184, 80, False, HARDSWISH, 1),
    Row(3, 480, 112, True, HARDSWISH, 1),
    Row(3, 672, 112, True, HARDSWISH, 1),
    Row(5, 672, 160, True, HARDSWISH, 2),
    Row(5, 960, 160, True, HARDSWISH, 1),
    Row(5, 960, 160, True, HARDSWISH, 1),
)
ARCHS: dict[str, tuple[Row, ...]] = {
    "small": SMALL,
    "small_075": _rows(
        (16, 72, 88, 96, 192, 192, 96, 120, 240, 432, 432),
        (16, 24, 24, 32, 32, 32, 40, 40, 72, 72, 72),
        SMALL,
    ),
    "small_050": _rows(
        (16, 40, 56, 64, 144, 144, 72, 72, 144, 288, 288),
        (8, 16, 16, 24, 24, 24, 24, 24, 48, 48, 48),
        SMALL,
    ),
    "large": LARGE,
}


@dataclass(frozen=True)
class MobileNetV3Spec:
    """What decides the numbers and the names of the weights."""

    arch: str
    conv: ConvSpec
    in_channels: int = 3

    def rows(self) -> tuple[Row, ...]:
        """The blocks."""
        return ARCHS[self.arch]

    def widths(self) -> tuple[int, ...]:
        """Channels of the stem, of the blocks and of the last convolution, which are those inside the last block."""
        rows = self.rows()
        return STEM_WIDTH, *(row.outputs for row in rows), rows[-1].hidden

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a layer."""
        strides = itertools.accumulate((2, *(row.stride for row in self.rows()), 1), lambda a, b: a * b)
        return map_features(self.widths(), tuple(strides))


def _block(inputs: int, row: Row) -> BlockSpec:
    squeeze = SqueezeSpec(make_divisible(row.hidden // 4, 8), RELU, GATE) if row.squeezes else None
    return BlockSpec(inputs, row.outputs, row.hidden, row.kernel, row.stride, squeeze, row.activation)


class MobileNetV3(Backbone):
    """Layer by layer: `layer0` is the stem, then the blocks, then the last convolution."""

    def __init__(self, spec: MobileNetV3Spec) -> None:
        super().__init__()
        self.features = spec.features()
        widths = spec.widths()
        self.layer0 = conv(spec.conv, spec.in_channels, STEM_WIDTH, 3, stride=2, activation=HARDSWISH)
        for index, row in enumerate(spec.rows(), start=1):
            self.add_module(f"layer{index}", InvertedResidual(spec.conv, _block(widths[index - 1], row)))
        last = conv(spec.conv, widths[-2], widths[-1], 1, activation=HARDSWISH)
        self.add_module(f"layer{len(widths) - 1}", last)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for index in range(deepest(nodes) + 1):
            maps = getattr(self, f"layer{index}")(maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is `layer0` to `layer{k}`."""
        return frozen_by_stage(self, freeze, lambda k: [f"layer{index}" for index in range(k + 1)])


# --- mmpretrain.MobileNetV3 = mmcls.MobileNetV3 ---------------------------------------------------


class MobileNetV3Config(OpenMMLabConfig):
    """`mmpretrain.MobileNetV3`, which is also `mmcls.MobileNetV3`."""

    NETWORK: ClassVar[str] = "MobileNetV3"

    arch: Annotated[str, named_arch(ARCHS, fold=False)] = Field(
        "small", json_schema_extra={"enum": list(ARCHS)}
    )
    out_indices: Indices = Field(
        (-1,),
        description="Layers: 0 the stem, 1 to 11 (small) or 15 (large) the blocks, then the last convolution.",
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=16)] = Field(
        -1, description="-1 nothing, k layer0 (the stem) to layer k."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm(1e-3)

    @field_validator("out_indices", mode="before")
    @classmethod
    def _null_is_the_last(cls, value: object, info: ValidationInfo) -> object:  # noqa: ARG003
        return (-1,) if value is None else value

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        layers = len(spec.widths()) - 1
        if self.frozen_stages > layers:
            yield "frozen_stages", f"{self.frozen_stages} is more than the last layer, {layers}"
        widths = (*spec.widths(), *(row.hidden for row in spec.rows()))
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def spec(self) -> MobileNetV3Spec:
        """The neutral spelling."""
        layers = ConvSpec(self.norm_cfg.spec(), HARDSWISH, pads_same(self.conv_cfg))
        return MobileNetV3Spec(self.arch, layers)


# timm counts the blocks of each stride, torchvision and OpenMMLab all of them.
_TIMM_LENGTHS = {"small": (1, 2, 3, 2, 3), "large": (1, 2, 3, 4, 2, 3)}


def _timm_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    large = ("layer16.conv.weight" if ours else "blocks.6.0.conv.weight") in names
    theirs = counted_through(_TIMM_LENGTHS["large" if large else "small"], 0, "blocks.")
    last = f"layer{len(theirs) + 1}."
    head = "blocks.6.0." if large else "blocks.5.0."
    pairs = [(f"layer{place}.", block) for place, block in enumerate(theirs, 1)]
    return (
        *rules(
            {
                "layer0.conv.{leaf}": "conv_stem.{leaf}",
                "layer0.bn.{leaf}": "bn1.{leaf}",
                last + "conv.{leaf}": head + "conv.{leaf}",
                last + "bn.{leaf}": head + "bn1.{leaf}",
            }
        ),
        *timm_block_rules(pairs, names, ours=ours),
    )


def _torchvision_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    large = ("layer16.conv.weight" if ours else "features.16.0.weight") in names
    blocks = sum(_TIMM_LENGTHS["large" if large else "small"])
    found: dict[str, str] = {}
    for place, layer in ((0, 0), (blocks + 1, blocks + 1)):
        found |= _conv_with_norm(f"layer{layer}.", f"features.{place}.")
    for place in range(1, blocks + 1):
        mine, theirs = f"layer{place}.", f"features.{place}.block."
        parts = _parts(mine, names) if ours else _torchvision_parts(theirs, names)
        for index, part in enumerate(parts):
            if part == "se":
                found |= {
                    f"{mine}se.conv{k}.conv.{{leaf}}": f"{theirs}{index}.fc{k}.{{leaf}}" for k in (1, 2)
                }
            else:
                found |= _conv_with_norm(f"{mine}{part}.", f"{theirs}{index}.")
    return rules(found)


def _conv_with_norm(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}conv.{{leaf}}": f"{theirs}0.{{leaf}}", f"{ours}bn.{{leaf}}": f"{theirs}1.{{leaf}}"}


def _parts(prefix: str, names: Collection[str]) -> list[str]:
    """The parts of one of our blocks, in the order in which they are applied."""
    order = ("expand_conv", "depthwise_conv", "se", "linear_conv")
    return [part for part in order if any(name.startswith(f"{prefix}{part}.") for name in names)]


def _torchvision_parts(prefix: str, names: Collection[str]) -> list[str]:
    """The same of one of torchvision's blocks: only squeeze-and-excitation has other names than the rest."""
    present = {int(name.removeprefix(prefix).split(".")[0]) for name in names if name.startswith(prefix)}
    excited = {place for place in present if f"{prefix}{place}.fc1.weight" in names}
    convolutions = ["expand_conv", "depthwise_conv", "linear_conv"][3 - len(present - excited) :]
    named = iter(convolutions)
    return ["se" if place in excited else next(named) for place in sorted(present)]


MOBILENET_V3_NAMES = Naming(
    "MobileNetV3",
    own=("mmpretrain",),
    marks=("layer0.conv.weight", "layer1.depthwise_conv.conv.weight", "layer11.expand_conv.conv.weight"),
    layouts=(
        KeyLayout("torchvision", _torchvision_rules),
        KeyLayout(
            "timm",
            _timm_rules,
            differs="timm's MobileNetV3 has batch norms of epsilon 1e-5, OpenMMLab's and torchvision's of 1e-3",
        ),
    ),
)


MOBILENET_V3 = make_family(
    MobileNetV3Config,
    MobileNetV3,
    example={"arch": "small", "out_indices": [3, 8, 11]},
    architectures=tuple(ARCHS),
    naming=MOBILENET_V3_NAMES,
)
