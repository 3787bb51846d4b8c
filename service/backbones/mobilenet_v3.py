"""MobileNetV3 (Howard et al., arXiv:1905.02244) with mmpretrain's key names."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, NamedTuple

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from service.backbones.base import Backbone, Indices
from service.backbones.inverted_residual import BlockSpec, ConvSpec, InvertedResidual, SqueezeSpec, conv
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


MOBILENET_V3 = make_family(
    MobileNetV3Config,
    MobileNetV3,
    example={"arch": "small", "out_indices": [3, 8, 11]},
    architectures=tuple(ARCHS),
)
