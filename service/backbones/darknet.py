"""Darknet-53 (YOLOv3, arXiv:1804.02767) as mmdet has it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, CheckpointName, Indices
from service.backbones.norms import NormConfig
from service.backbones.openmmlab import (
    ActivationConfig,
    OpenMMLabConfig,
    PlainConvConfig,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    norm_fault,
)
from service.backbones.yolo import PLAIN, ConvStyle
from service.config.spec import FeatureInfo, Freeze, FreezeReport, WeightsRef

WIDTHS = (32, 64, 128, 256, 512, 1024)
BLOCKS = (1, 2, 8, 8, 4)
LAYERS = ("conv1", *(f"conv_res_block{stage}" for stage in range(1, 6)))


@dataclass(frozen=True)
class DarknetSpec:
    """What decides the numbers and the names of the weights."""

    style: ConvStyle
    in_channels: int = 3

    def features(self) -> tuple[FeatureInfo, ...]:
        """The maps of the first convolution and of the stages."""
        return map_features(WIDTHS, (1, 2, 4, 8, 16, 32))


class ResidualBlock(nn.Module):
    """A 1x1 to half the channels and a 3x3 back around a shortcut; keys `conv1`, `conv2`."""

    def __init__(self, style: ConvStyle, width: int) -> None:
        super().__init__()
        self.conv1 = style.conv(width, width // 2)
        self.conv2 = style.conv(width // 2, width, 3)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, c, h, w] to the same shape."""
        found: Tensor = self.conv2(self.conv1(maps)) + maps
        return found


class Darknet(Backbone):
    """Darknet-53 with mmdet's keys; a node is an index, 0 is the first convolution at full size."""

    def __init__(self, spec: DarknetSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.conv1 = spec.style.conv(spec.in_channels, WIDTHS[0], 3)
        for stage, blocks in enumerate(BLOCKS):
            inputs, width = WIDTHS[stage], WIDTHS[stage + 1]
            layers: OrderedDict[str, nn.Module] = OrderedDict(
                conv=spec.style.conv(inputs, width, 3, stride=2)
            )
            for position in range(blocks):
                layers[f"res{position}"] = ResidualBlock(spec.style, width)
            self.add_module(LAYERS[stage + 1], nn.Sequential(layers))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them."""
        found = {}
        for index in range(deepest(nodes) + 1):
            images = getattr(self, LAYERS[index])(images)
            found[str(index)] = images
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """k freezes the first k layers; their norms are in eval."""
        return frozen_by_stage(self, freeze, lambda k: LAYERS[:k])


class DarknetConfig(OpenMMLabConfig):
    """`mmdet.Darknet`."""

    NETWORK: ClassVar[str] = "Darknet"

    depth: Literal[53] = 53
    out_indices: Indices = Field(
        (3, 4, 5), description="0 is the first convolution, k the k-th of the five stages."
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=6)] = Field(
        -1, description="-1 and 0 nothing, 1 the first convolution, k also the first k - 1 stages."
    )
    conv_cfg: PlainConvConfig | None = None
    norm_cfg: NormConfig = NormConfig(type="BN")
    act_cfg: ActivationConfig | None = Field(
        ActivationConfig(type="LeakyReLU", negative_slope=0.1), description="null is none."
    )
    norm_eval: bool = Field(True, description="True keeps every batch norm in eval mode.")
    pretrained: CheckpointName | None = Field(
        None, description="Deprecated spelling of init_cfg with this checkpoint."
    )

    def spec(self) -> DarknetSpec:
        """The neutral spelling."""
        activation = PLAIN if self.act_cfg is None else self.act_cfg.spec()
        return DarknetSpec(ConvStyle(self.norm_cfg.spec(), activation))

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if (fault := norm_fault(self.norm_cfg, WIDTHS)) is not None:
            yield fault
        if self.pretrained is not None and (self.init_cfg or self.checkpoint) is not None:
            yield "pretrained", "give pretrained or init_cfg, not both"

    def weights(self) -> WeightsRef | None:
        """Where the weights come from; None means random ones from a seed of `key()`."""
        if self.pretrained is not None:
            return WeightsRef(self.pretrained, pointer="#/backbone/pretrained")
        return super().weights()


DARKNET = make_family(
    DarknetConfig, Darknet, example={"depth": 53, "out_indices": [0, 1, 2, 3, 4, 5]}, architectures=("53",)
)
