"""MobileNetV2 (Sandler et al., arXiv:1801.04381) with OpenMMLab's key names; mmpretrain and mmdet name blocks apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, CheckpointName, Indices
from service.backbones.freezing import freeze_report, in_module_order, is_under
from service.backbones.inverted_residual import (
    BlockSpec,
    ConvSpec,
    InvertedResidual,
    NestedInvertedResidual,
    conv,
)
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ConvConfig,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    make_divisible,
    make_family,
    map_features,
    norm_fault,
    pads_same,
)
from service.config.spec import FeatureInfo, Freeze, FreezeReport, WeightsRef
from service.errors import InvalidConfig

# factor of expansion, channels, blocks, stride of the first
LAYERS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STRIDES = (2, 4, 8, 16, 16, 32, 32, 32)


@dataclass(frozen=True)
class MobileNetV2Spec:
    """What decides the numbers and the names of the weights. `nested` is how mmpretrain names a block's layers."""

    widen_factor: float
    conv: ConvSpec
    nested: bool
    in_channels: int = 3

    def widths(self) -> tuple[int, ...]:
        """Channels of the stem, of layers 1 to 7 and of the last convolution."""
        layers = (make_divisible(channels * self.widen_factor, 8) for _, channels, _, _ in LAYERS)
        last = int(1280 * max(self.widen_factor, 1.0))
        return make_divisible(32 * self.widen_factor, 8), *layers, last

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a layer, the last convolution's too."""
        return map_features(self.widths()[1:], STRIDES)


def _layer(spec: MobileNetV2Spec, index: int) -> nn.Sequential:
    ratio, _, count, stride = LAYERS[index]
    inputs, outputs = spec.widths()[index : index + 2]
    make = NestedInvertedResidual if spec.nested else InvertedResidual
    blocks = []
    for position in range(count):
        block = BlockSpec(inputs, outputs, inputs * ratio, 3, stride if position == 0 else 1)
        blocks.append(make(spec.conv, block))
        inputs = outputs
    return nn.Sequential(*blocks)


class MobileNetV2(Backbone):
    """Indices 0 to 6 are `layer1` to `layer7`, 7 is the last convolution, `conv2`."""

    def __init__(self, spec: MobileNetV2Spec) -> None:
        super().__init__()
        widths = spec.widths()
        self.features = spec.features()
        self.conv1 = conv(spec.conv, spec.in_channels, widths[0], 3, stride=2)
        for index in range(len(LAYERS)):
            self.add_module(f"layer{index + 1}", _layer(spec, index))
        self.conv2 = conv(spec.conv, widths[-2], widths[-1], 1)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        maps = self.conv1(images)
        found = {}
        for index in range(deepest(nodes) + 1):
            name = f"layer{index + 1}" if index < len(LAYERS) else "conv2"
            maps = getattr(self, name)(maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """OpenMMLab's rule: 0 is `conv1`, k adds `layer1` to `layer{k}`; the norm of `conv1` stays in train mode."""
        if freeze.stages is None:
            return freeze_report(self, freeze, ())
        layers = freeze_report(self, freeze, [f"layer{index}" for index in range(1, freeze.stages + 1)])
        stem = [name for name, _ in self.named_parameters() if is_under(name, ("conv1",))]
        return in_module_order(self, freeze, (*stem, *layers.parameters), layers.norms)


# --- mmpretrain.MobileNetV2, mmdet.MobileNetV2 ----------------------------------------------------


class MobileNetV2Config(OpenMMLabConfig):
    """`mmpretrain.MobileNetV2`, which is also `mmcls.MobileNetV2`."""

    NETWORK: ClassVar[str] = "MobileNetV2"
    NESTED: ClassVar[bool] = True

    widen_factor: Annotated[float, Field(gt=0.05, le=4)] = Field(1.0, description="Multiplies all widths.")
    out_indices: Indices = Field((7,), description="0 to 6 are layer1 to layer7, 7 the last convolution.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=7)] = Field(
        -1,
        description="-1 nothing, 0 conv1, k conv1 and layer1 to layer k; the norm of conv1 stays in train mode.",
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU6")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        widths = self.spec().widths()
        expanded = (width * ratio for width, (ratio, *_) in zip(widths, LAYERS, strict=False))
        if (fault := norm_fault(self.norm_cfg, (*widths, *expanded))) is not None:
            yield fault

    def spec(self) -> MobileNetV2Spec:
        """The neutral spelling."""
        layers = ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec(), pads_same(self.conv_cfg))
        return MobileNetV2Spec(self.widen_factor, layers, nested=self.NESTED)


class DetMobileNetV2Config(MobileNetV2Config):
    """`mmdet.MobileNetV2`: other default indices, and other names of the layers inside a block."""

    NESTED: ClassVar[bool] = False

    out_indices: Indices = Field(
        (1, 2, 4, 7), description="0 to 6 are layer1 to layer7, 7 the last convolution."
    )
    pretrained: CheckpointName | None = Field(None, description="mmdet's older spelling of init_cfg.")

    def architecture(self) -> dict[str, object]:
        """The neutral spelling."""
        return {"scope": "mmdet", **super().architecture()}

    def weights(self) -> WeightsRef | None:
        """Where the weights come from."""
        return weights_or_pretrained(super().weights(), self.pretrained)


def weights_or_pretrained(ref: WeightsRef | None, pretrained: str | None) -> WeightsRef | None:
    """The checkpoint of `init_cfg` and its short spellings, or of mmdet's `pretrained`.

    Raises:
        InvalidConfig: both are given.
    """
    if pretrained is None:
        return ref
    if ref is not None:
        raise InvalidConfig("#/backbone/pretrained", "give init_cfg or pretrained, not both")
    return WeightsRef(pretrained, pointer="#/backbone/pretrained")


EXAMPLE = {"out_indices": [1, 2, 4, 6]}
MOBILENET_V2 = make_family(MobileNetV2Config, MobileNetV2, example=EXAMPLE)
DET_MOBILENET_V2 = make_family(DetMobileNetV2Config, MobileNetV2, example=EXAMPLE)
