"""MobileNetV2 (Sandler et al., arXiv:1801.04381) with OpenMMLab's key names; mmpretrain and mmdet name blocks apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, CheckpointName, Indices
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
    frozen_with_live_stem_norms,
    make_divisible,
    make_family,
    map_features,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, Naming, rules
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
        return frozen_with_live_stem_norms(
            self, freeze, "conv1", lambda k: [f"layer{index}" for index in range(1, k + 1)]
        )


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
_TIMM_PARTS = (("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3"))
_TIMM_FIRST = (("conv_dw", "bn1"), ("conv_pw", "bn2"))
_LENGTHS = (1, 2, 3, 4, 3, 3, 1)


def _timm_names() -> dict[str, str]:
    found = {}
    for ours, theirs, parts in (
        ("layer1.{b}", "blocks.0.{b}", _TIMM_FIRST),
        ("layer{s+1}.{b}", "blocks.{s}.{b}", _TIMM_PARTS),
    ):
        for index, (weights, norm) in enumerate(parts):
            found[f"{ours}.conv.{index}.conv.{{leaf}}"] = f"{theirs}.{weights}.{{leaf}}"
            found[f"{ours}.conv.{index}.bn.{{leaf}}"] = f"{theirs}.{norm}.{{leaf}}"
    return found


def _torchvision_names() -> dict[str, str]:
    """torchvision counts the blocks through, and leaves a block's last norm beside its convolution."""
    blocks = [(stage + 1, block) for stage, length in enumerate(_LENGTHS) for block in range(length)]
    found = {}
    for place, (stage, block) in enumerate(blocks, 1):
        last = 1 if stage == 1 else 2
        for index in range(last):
            found[f"layer{stage}.{block}.conv.{index}.conv.{{leaf}}"] = (
                f"features.{place}.conv.{index}.0.{{leaf}}"
            )
            found[f"layer{stage}.{block}.conv.{index}.bn.{{leaf}}"] = (
                f"features.{place}.conv.{index}.1.{{leaf}}"
            )
        found[f"layer{stage}.{block}.conv.{last}.conv.{{leaf}}"] = f"features.{place}.conv.{last}.{{leaf}}"
        found[f"layer{stage}.{block}.conv.{last}.bn.{{leaf}}"] = f"features.{place}.conv.{last + 1}.{{leaf}}"
    return found


# mmdet's blocks name their convolutions; the first does not expand.
_MMDET_FIRST = ("depthwise_conv", "linear_conv")
_MMDET_PARTS = ("expand_conv", *_MMDET_FIRST)
_MMDET_NAMES = {
    f"{layer}.{{b}}.conv.{index}.{{rest}}": f"{layer}.{{b}}.{part}.{{rest}}"
    for layer, parts in (("layer1", _MMDET_FIRST), ("layer{s}", _MMDET_PARTS))
    for index, part in enumerate(parts)
}
MOBILENET_V2_NAMES = Naming(
    "MobileNetV2",
    own=("mmpretrain",),
    marks=("conv1.conv.weight", "layer1.0.conv.0.conv.weight", "layer7.0.conv.2.conv.weight"),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "conv1.conv.{leaf}": "conv_stem.{leaf}",
                    "conv1.bn.{leaf}": "bn1.{leaf}",
                    "conv2.conv.{leaf}": "conv_head.{leaf}",
                    "conv2.bn.{leaf}": "bn2.{leaf}",
                    **_timm_names(),
                }
            ),
        ),
        KeyLayout(
            "torchvision",
            rules(
                {
                    "conv1.conv.{leaf}": "features.0.0.{leaf}",
                    "conv1.bn.{leaf}": "features.0.1.{leaf}",
                    "conv2.conv.{leaf}": "features.18.0.{leaf}",
                    "conv2.bn.{leaf}": "features.18.1.{leaf}",
                    **_torchvision_names(),
                }
            ),
        ),
        KeyLayout(
            "mmdet", rules({**_MMDET_NAMES, "conv1.{rest}": "conv1.{rest}", "conv2.{rest}": "conv2.{rest}"})
        ),
    ),
)


MOBILENET_V2 = make_family(MobileNetV2Config, MobileNetV2, naming=MOBILENET_V2_NAMES, example=EXAMPLE)
DET_MOBILENET_V2 = make_family(
    DetMobileNetV2Config, MobileNetV2, naming=MOBILENET_V2_NAMES, library="mmdet", example=EXAMPLE
)
