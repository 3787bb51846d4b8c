"""EfficientNetV2 (Tan and Le, arXiv:2104.00298) with mmpretrain's key names."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.efficientnet import SIGMOID
from service.backbones.inverted_residual import (
    BlockSpec,
    ConvSpec,
    EdgeResidual,
    InvertedResidual,
    SkipConv,
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
    ConvConfig,
    ConvModule,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    named_arch,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, rules
from service.checkpoints.read import StateDict
from service.config.spec import FeatureInfo, Freeze, FreezeReport


@dataclass(frozen=True)
class Plan:
    """The stages by the paper: `counts` blocks of `widths` channels, between a stem and a last convolution."""

    counts: tuple[int, ...]
    widths: tuple[int, ...]
    stem: int
    last: int = 1280


ARCHS: dict[str, Plan] = {
    name: plan
    for names, plan in (
        (("s", "small"), Plan((2, 4, 4, 6, 9, 15), (24, 48, 64, 128, 160, 256), 24)),
        (("m", "medium"), Plan((3, 5, 5, 7, 14, 18, 5), (24, 48, 80, 160, 176, 304, 512), 24)),
        (("l", "large"), Plan((4, 7, 7, 10, 19, 25, 7), (32, 64, 96, 192, 224, 384, 640), 32)),
        (("xl",), Plan((4, 8, 8, 16, 24, 32, 8), (32, 64, 96, 192, 256, 512, 640), 32)),
        (("b0",), Plan((1, 2, 2, 3, 5, 8), (16, 32, 48, 96, 112, 192), 32)),
        (("b1",), Plan((2, 3, 3, 4, 6, 9), (16, 32, 48, 96, 112, 192), 32)),
        (("b2",), Plan((2, 3, 3, 4, 6, 10), (16, 32, 56, 104, 120, 208), 32, 1408)),
        (("b3",), Plan((2, 3, 3, 5, 7, 12), (16, 40, 56, 112, 136, 232), 40, 1536)),
    )
    for name in names
}
STRIDES = (1, 2, 2, 2, 1, 2, 1)
EXPAND = (1, 4, 4, 4, 6, 6, 6)
# The first stage has plain convolutions, the next two fused blocks, the rest inverted ones.
BLOCKS: tuple[Callable[[ConvSpec, BlockSpec], nn.Module], ...] = (
    SkipConv,
    EdgeResidual,
    EdgeResidual,
    *(InvertedResidual,) * 4,
)


@dataclass(frozen=True)
class EfficientNetV2Spec:
    """What decides the numbers and the names of the weights."""

    arch: str
    conv: ConvSpec
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a level: the stem, the stages, the last convolution."""
        plan = ARCHS[self.arch]
        channels = (plan.stem, *plan.widths, plan.last)
        steps = (2, *STRIDES[: len(plan.widths)], 1)
        return map_features(channels, tuple(itertools.accumulate(steps, lambda a, b: a * b)))


def _stage(spec: EfficientNetV2Spec, index: int, inputs: int) -> nn.Sequential:
    plan = ARCHS[spec.arch]
    outputs, make = plan.widths[index], BLOCKS[index]
    blocks = []
    for position in range(plan.counts[index]):
        squeeze = (
            SqueezeSpec(inputs // 4, spec.conv.activation, SIGMOID) if make is InvertedResidual else None
        )
        stride = STRIDES[index] if position == 0 else 1
        blocks.append(make(spec.conv, BlockSpec(inputs, outputs, inputs * EXPAND[index], 3, stride, squeeze)))
        inputs = outputs
    return nn.Sequential(*blocks)


def _stem(spec: EfficientNetV2Spec) -> ConvModule:
    # The library gives it no padding, which only a convolution that pads by itself makes up for.
    return ConvModule(
        spec.in_channels,
        ARCHS[spec.arch].stem,
        3,
        stride=2,
        padding=0,
        norm=spec.conv.norm,
        activation=spec.conv.activation,
        same_pad=spec.conv.same_pad,
    )


class EfficientNetV2(Backbone):
    """`layers.0` is the stem, then the stages, then the last convolution."""

    def __init__(self, spec: EfficientNetV2Spec) -> None:
        super().__init__()
        self.features = spec.features()
        widths = [feature.channels for feature in self.features]
        stages = range(len(widths) - 2)
        self.layers = nn.ModuleList(
            [
                _stem(spec),
                *(_stage(spec, index, widths[index]) for index in stages),
                conv(spec.conv, widths[-2], widths[-1], 1),
            ]
        )

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the levels in `nodes`; stops after the deepest of them."""
        maps, found = images, {}
        for index in range(deepest(nodes) + 1):
            maps = self.layers[index](maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is `layers.0` to `layers.{k - 1}`, 0 nothing."""
        return frozen_by_stage(self, freeze, lambda k: [f"layers.{index}" for index in range(k)])


# --- mmpretrain.EfficientNetV2 = mmcls.EfficientNetV2 ---------------------------------------------


class EfficientNetV2Config(OpenMMLabConfig):
    """`mmpretrain.EfficientNetV2`, which is also `mmcls.EfficientNetV2`."""

    NETWORK: ClassVar[str] = "EfficientNetV2"

    arch: Annotated[str, named_arch(ARCHS)] = Field("s", json_schema_extra={"enum": list(ARCHS)})
    in_channels: InputChannels = 3
    drop_path_rate: DropRate = Field(0.0, description="Training only; changes nothing here.")
    out_indices: Indices = Field(
        (-1,), description="0 the stem, then the 6 (s, b0 to b3) or 7 stages, then the last convolution."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=0, le=9)] = Field(
        0, description="0 nothing, k the stem and the levels below k: layers.0 to layers.k-1."
    )
    conv_cfg: ConvConfig | None = ConvConfig(type="Conv2dAdaptivePadding")
    norm_cfg: NormConfig = batch_norm(1e-3)
    act_cfg: ActivationConfig = ActivationConfig(type="Swish")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        features = self.spec().features()
        if self.frozen_stages > len(features):
            yield "frozen_stages", f"{self.frozen_stages} is more than the {len(features)} levels"
        if (fault := norm_fault(self.norm_cfg, [feature.channels for feature in features])) is not None:
            yield fault

    def misfits(self, library: str, checkpoint: str, state: StateDict) -> str | None:  # noqa: ARG002 - see below
        """timm has every one of these twice, under the same names in the file."""
        return not_tensorflows(checkpoint) if library == "timm" else None

    def spec(self) -> EfficientNetV2Spec:
        """The neutral spelling."""
        layers = ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec(), pads_same(self.conv_cfg))
        return EfficientNetV2Spec(self.arch, layers, self.in_channels)


def _timm_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    pattern = r"layers\.(\d+)\.(\d+)\." if ours else r"blocks\.(\d+)\.(\d+)\."
    lengths = stage_lengths(names, pattern)
    pairs = zip(counted_through(lengths, 1, "layers."), counted_through(lengths, 0, "blocks."), strict=True)
    head = f"layers.{len(lengths) + 1}."
    return (
        *rules(
            {
                "layers.0.conv.{leaf}": "conv_stem.{leaf}",
                "layers.0.bn.{leaf}": "bn1.{leaf}",
                head + "conv.{leaf}": "conv_head.{leaf}",
                head + "bn.{leaf}": "bn2.{leaf}",
            }
        ),
        *timm_block_rules(pairs, names, ours=ours),
    )


EFFICIENTNET_V2_NAMES = Naming(
    "EfficientNetV2",
    own=("mmpretrain",),
    marks=("layers.0.conv.weight", "layers.2.0.conv1.conv.weight", "layers.4.0.expand_conv.conv.weight"),
    layouts=(KeyLayout("timm", _timm_rules),),
)


EFFICIENTNET_V2 = make_family(
    EfficientNetV2Config,
    EfficientNetV2,
    example={"arch": "b0", "out_indices": [3, 5, 6]},
    architectures=tuple(ARCHS),
    naming=EFFICIENTNET_V2_NAMES,
)
