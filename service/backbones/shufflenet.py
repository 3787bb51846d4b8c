"""ShuffleNetV1 (Zhang et al., arXiv:1707.01083) and V2 (Ma et al., arXiv:1807.11164) with mmpretrain's key names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices
from service.backbones.inverted_residual import NO_ACTIVATION, ConvSpec, conv
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    ConvConfig,
    OpenMMLabConfig,
    batch_norm,
    deepest,
    frozen_with_live_stem_norms,
    make_activation,
    make_divisible,
    make_family,
    map_features,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import FeatureInfo, Freeze, FreezeReport

BLOCKS = (4, 8, 4)
# channels of the three stages, by the groups of the 1x1 convolutions
WIDTHS_V1 = {
    1: (144, 288, 576),
    2: (200, 400, 800),
    3: (240, 480, 960),
    4: (272, 544, 1088),
    8: (384, 768, 1536),
}
# channels of the three stages and of the last convolution, by the factor of width
WIDTHS_V2 = {
    0.5: (48, 96, 192, 1024),
    1.0: (116, 232, 464, 1024),
    1.5: (176, 352, 704, 1024),
    2.0: (244, 488, 976, 2048),
}
STEM_V2 = 24


@dataclass(frozen=True)
class ShuffleNetSpec:
    """What decides the numbers and the names of the weights: channels of the stem, of the stages, of the last layer.

    `groups` are those of ShuffleNetV1's 1x1 convolutions; `last` is what only ShuffleNetV2 has.
    """

    conv: ConvSpec
    stem: int
    widths: tuple[int, ...]
    groups: int = 1
    last: int | None = None
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage, and that of the last convolution."""
        last = () if self.last is None else (self.last,)
        return map_features((*self.widths, *last), (8, 16, 32, 32)[: len(self.widths) + len(last)])


def shuffle(maps: Tensor, groups: int) -> Tensor:
    """[n, c, h, w] with the channels of the groups interleaved: the first of each, the second of each, …."""
    n, channels, height, width = maps.shape
    grouped = maps.view(n, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(n, channels, height, width)


class ShuffleUnit(nn.Module):
    """Two grouped 1x1 convolutions around a depthwise one; keys `g_conv_1x1_compress`, `depthwise_conv3x3_bn`, ….

    The first unit of a stage halves the map and puts its pooled input before what it computes; the others add.
    """

    def __init__(
        self, spec: ShuffleNetSpec, inputs: int, outputs: int, *, strided: bool, grouped: bool
    ) -> None:
        super().__init__()
        self.groups, self.strided = spec.groups, strided
        hidden, new = outputs // 4, outputs - inputs if strided else outputs
        plain, none = spec.conv, NO_ACTIVATION
        stride = 2 if strided else 1
        self.g_conv_1x1_compress = conv(plain, inputs, hidden, 1, groups=spec.groups if grouped else 1)
        self.depthwise_conv3x3_bn = conv(
            plain, hidden, hidden, 3, stride=stride, groups=hidden, activation=none
        )
        self.g_conv_1x1_expand = conv(plain, hidden, new, 1, groups=spec.groups, activation=none)
        self.act = make_activation(plain.activation)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        mixed = self.depthwise_conv3x3_bn(self.g_conv_1x1_compress(maps))
        mixed = self.g_conv_1x1_expand(shuffle(mixed, self.groups))
        if self.strided:
            return torch.cat((F.avg_pool2d(maps, 3, stride=2, padding=1), self.act(mixed)), dim=1)
        activated: Tensor = self.act(maps + mixed)
        return activated


class SplitUnit(nn.Module):
    """Half of the channels pass, half are filtered, and both are interleaved; keys `branch1`, `branch2`.

    The first unit of a stage halves the map, and filters all channels twice.
    """

    def __init__(self, spec: ShuffleNetSpec, inputs: int, outputs: int, *, strided: bool) -> None:
        super().__init__()
        half, stride, plain, none = outputs // 2, 2 if strided else 1, spec.conv, NO_ACTIVATION
        if strided:
            self.branch1 = nn.Sequential(
                conv(plain, inputs, inputs, 3, stride=2, groups=inputs, activation=none),
                conv(plain, inputs, half, 1),
            )
        self.strided = strided
        self.branch2 = nn.Sequential(
            conv(plain, inputs if strided else half, half, 1),
            conv(plain, half, half, 3, stride=stride, groups=half, activation=none),
            conv(plain, half, half, 1),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """[n, inputs, h, w] to [n, outputs, h / stride, w / stride]."""
        passed, filtered = (self.branch1(maps), maps) if self.strided else maps.chunk(2, dim=1)
        return shuffle(torch.cat((passed, self.branch2(filtered)), dim=1), 2)


class ShuffleNet(Backbone):
    """Keys `conv1` and `layers.0`, `layers.1`, …; of V2 the last layer is a convolution."""

    def __init__(self, spec: ShuffleNetSpec) -> None:
        super().__init__()
        self.spec = spec
        self.features = spec.features()
        self.conv1 = conv(spec.conv, spec.in_channels, spec.stem, 3, stride=2)
        inputs = (spec.stem, *spec.widths)
        self.layers = nn.ModuleList(
            nn.Sequential(
                *(self._unit(inputs[stage], width, stage, position) for position in range(BLOCKS[stage]))
            )
            for stage, width in enumerate(spec.widths)
        )
        if spec.last is not None:
            self.layers.append(conv(spec.conv, inputs[-1], spec.last, 1))

    def _unit(self, inputs: int, outputs: int, stage: int, position: int) -> nn.Module:
        strided = position == 0
        inputs = inputs if strided else outputs
        if self.spec.last is not None:
            return SplitUnit(self.spec, inputs, outputs, strided=strided)
        # The first unit has too few channels to group them.
        return ShuffleUnit(self.spec, inputs, outputs, strided=strided, grouped=stage + position > 0)

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        maps = F.max_pool2d(self.conv1(images), 3, stride=2, padding=1)
        found = {}
        for index in range(deepest(nodes) + 1):
            maps = self.layers[index](maps)
            found[str(index)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: 0 is `conv1`, k adds `layers.0` to `layers.{k - 1}`."""
        return frozen_with_live_stem_norms(self, freeze, "conv1", lambda k: [f"layers.{i}" for i in range(k)])


# --- mmpretrain.ShuffleNetV1, mmpretrain.ShuffleNetV2 ---------------------------------------------


class ShuffleNetConfig(OpenMMLabConfig):
    """The keys that both versions have."""

    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig = batch_norm()
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for position, index in enumerate(self.out_indices):
            if index < 0:
                yield f"out_indices/{position}", f"{index} is negative; the library counts none from the end"

    def conv_spec(self) -> ConvSpec:
        """The neutral spelling of what all convolutions have in common."""
        return ConvSpec(self.norm_cfg.spec(), self.act_cfg.spec(), pads_same(self.conv_cfg))


class ShuffleNetV1Config(ShuffleNetConfig):
    """`mmpretrain.ShuffleNetV1`, which is also `mmcls.ShuffleNetV1`."""

    NETWORK: ClassVar[str] = "ShuffleNetV1"

    groups: Literal[1, 2, 3, 4, 8] = Field(3, description="Of the 1x1 convolutions; decides the widths too.")
    widen_factor: Annotated[float, Field(ge=0.05, le=4)] = Field(1.0, description="Multiplies all widths.")
    out_indices: Indices = Field((2,), description="Stages 0 to 2, at strides 8 to 32.")
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=2)] = Field(
        -1, description="-1 nothing, 0 conv1 but its norm's mode, k conv1 and the first k stages."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        spec = self.spec()
        news = [new - old for old, new in zip((spec.stem, *spec.widths), spec.widths, strict=False)]
        hidden = [width // 4 for width in spec.widths]
        if any(width % self.groups for width in (*news, *hidden, *spec.widths)):
            yield "widen_factor", f"{self.groups} groups do not divide the widths {list(spec.widths)}"
        if (fault := norm_fault(self.norm_cfg, (spec.stem, *spec.widths, *news, *hidden))) is not None:
            yield fault

    def spec(self) -> ShuffleNetSpec:
        """The neutral spelling."""
        widths = tuple(make_divisible(width * self.widen_factor, 8) for width in WIDTHS_V1[self.groups])
        return ShuffleNetSpec(self.conv_spec(), int(24 * self.widen_factor), widths, self.groups)


class ShuffleNetV2Config(ShuffleNetConfig):
    """`mmpretrain.ShuffleNetV2`, which is also `mmcls.ShuffleNetV2`."""

    NETWORK: ClassVar[str] = "ShuffleNetV2"

    widen_factor: float = Field(
        1.0, description="Multiplies the widths.", json_schema_extra={"enum": list(WIDTHS_V2)}
    )
    out_indices: Indices = Field(
        (3,), description="0 to 2 are the stages at strides 8 to 32, 3 the last convolution."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=3)] = Field(
        -1, description="-1 nothing, 0 conv1 but its norm's mode, k conv1 and the first k stages."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from super().faults()
        if self.widen_factor not in WIDTHS_V2:
            yield "widen_factor", f"must be one of {', '.join(map(str, WIDTHS_V2))}"
            return
        spec = self.spec()
        widths = (spec.stem, spec.last or 1, *(width // 2 for width in spec.widths))
        if (fault := norm_fault(self.norm_cfg, widths)) is not None:
            yield fault

    def spec(self) -> ShuffleNetSpec:
        """The neutral spelling."""
        *widths, last = WIDTHS_V2[self.widen_factor]
        return ShuffleNetSpec(self.conv_spec(), STEM_V2, tuple(widths), last=last)


SHUFFLENET_V1 = make_family(ShuffleNetV1Config, ShuffleNet, example={"groups": 3, "out_indices": [0, 1, 2]})
# torchvision counts activations, which a 3x3 over each channel has not.
_PLACES = {"branch1": ((0, 1), (2, 3)), "branch2": ((0, 1), (3, 4), (5, 6))}
_BRANCHES = {
    f"{branch}.{index}.{part}.{{leaf}}": f"{branch}.{place}.{{leaf}}"
    for branch, places in _PLACES.items()
    for index, pair in enumerate(places)
    for part, place in zip(("conv", "bn"), pair, strict=True)
}
SHUFFLENET_V2_NAMES = Naming(
    "ShuffleNetV2",
    own=("mmpretrain",),
    marks=("conv1.conv.weight", "layers.0.0.branch1.1.conv.weight", "layers.2.0.branch2.2.conv.weight"),
    layouts=(
        KeyLayout(
            "torchvision",
            rules(
                {
                    "conv1.conv.{leaf}": "conv1.0.{leaf}",
                    "conv1.bn.{leaf}": "conv1.1.{leaf}",
                    **below("layers.{s}.{b}.", "stage{s+2}.{b}.", _BRANCHES),
                    "layers.3.conv.{leaf}": "conv5.0.{leaf}",
                    "layers.3.bn.{leaf}": "conv5.1.{leaf}",
                }
            ),
        ),
    ),
)


SHUFFLENET_V2 = make_family(
    ShuffleNetV2Config,
    ShuffleNet,
    example={"widen_factor": 1.0, "out_indices": [0, 1, 2]},
    naming=SHUFFLENET_V2_NAMES,
)
