"""mmpretrain's necks with weights between a backbone and a classifier: GeM, LinearNeck, HRFuseScales."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from service.backbones.norms import BATCH_NORM, Eps, NormConfig, NormSpec
from service.backbones.openmmlab import ActivationConfig, ActivationSpec, ConvModule, make_activation
from service.backbones.resnet import ResidualBlock, conv1x1, conv3x3
from service.config.spec import Layout
from service.errors import InvalidConfig
from service.necks.base import KINDS, POINTER, LevelFacts, Neck, require_maps
from service.necks.openmmlab import (
    OpenMMLabNeckConfig,
    Width,
    activation_spec,
    make_neck_family,
    require_widths,
)

# --- GeneralizedMeanPooling -----------------------------------------------------------------------


@dataclass(frozen=True)
class GeMSpec:
    """`p` is where a neck without a checkpoint starts; `floor` is the least a pixel counts, None is none."""

    p: float
    floor: float | None


class GeneralizedMeanPooling(Neck):
    """The generalised mean over the pixels of each map (Radenović et al., arXiv:1711.02512); key `p`."""

    def __init__(self, spec: GeMSpec) -> None:
        super().__init__()
        self.floor = spec.floor
        self.p = nn.Parameter(torch.full((1,), spec.p))

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c, h, w] each, to [n, c] each."""
        return [self._pooled(maps) for maps in features]

    def _pooled(self, maps: Tensor) -> Tensor:
        raised = maps if self.floor is None else maps.clamp(min=self.floor)
        return raised.pow(self.p).mean((2, 3)).pow(1 / self.p)


class GeMConfig(OpenMMLabNeckConfig):
    """`mmpretrain.GeneralizedMeanPooling`, which is also `mmcls.GeneralizedMeanPooling`."""

    NETWORK: ClassVar[str] = "GeneralizedMeanPooling"

    conv_cfg: None = None
    p: Annotated[float, Field(ge=1, le=64)] = Field(
        3.0, description="The power, where no checkpoint says it."
    )
    eps: Annotated[float, Field(gt=0, le=1)] = Field(1e-6, description="The least a pixel counts.")
    clamp: bool = Field(True, description="False leaves pixels as they are; negative ones have no power.")
    p_trainable: bool = Field(True, description="Matters in training only.")

    def spec(self) -> GeMSpec:
        """The neutral spelling."""
        return GeMSpec(self.p, self.eps if self.clamp else None)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not maps."""
        require_maps(levels, "GeneralizedMeanPooling")

    def takes(self) -> tuple[int, ...]:
        """Nothing in particular."""
        return ()

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """Each level keeps its index and name."""
        return tuple(replace(level, layout="NC", stride=None) for level in levels)


# --- LinearNeck -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearSpec:
    """What decides the numbers and the names of the weights; `pooled` takes maps or tokens, else vectors."""

    inputs: int
    outputs: int
    pooled: bool
    norm: NormSpec | None
    activation: ActivationSpec


class LinearNeck(Neck):
    """A linear layer, a norm and an activation over the last level; keys `fc`, `norm`."""

    def __init__(self, spec: LinearSpec) -> None:
        super().__init__()
        self.pooled = spec.pooled
        self.fc = nn.Linear(spec.inputs, spec.outputs)
        self.norm = nn.Identity() if spec.norm is None else vector_norm(spec.norm, spec.outputs)
        self.act = make_activation(spec.activation)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w], [n, c, l] or [n, c] to [n, outputs]."""
        vectors = features[-1].flatten(2).mean(2) if self.pooled else features[-1]
        return [self.act(self.norm(self.fc(vectors)))]


def vector_norm(spec: NormSpec, width: int, *, affine: bool = True) -> nn.Module:
    """A norm of [n, width]; without a weight and a bias where it is not `affine`."""
    if spec.kind == "ln":
        return nn.LayerNorm(width, eps=spec.eps, elementwise_affine=affine)
    return nn.BatchNorm1d(width, eps=spec.eps, affine=affine)


class VectorNormConfig(BaseModel):
    """OpenMMLab's `norm_cfg` for vectors."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    type: Literal["BN1d", "SyncBN", "LN"]
    requires_grad: bool = Field(True, description="Matters in training only.")
    eps: Eps = 1e-5
    momentum: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Matters in training only."
    )

    def spec(self) -> NormSpec:
        """The neutral spelling."""
        return NormSpec("ln" if self.type == "LN" else "bn", self.eps)


# the layout that has so many dimensions to average over
POOLED: tuple[Layout, ...] = ("NC", "NCL", "NCHW")


class LinearConfig(OpenMMLabNeckConfig):
    """`mmpretrain.LinearNeck`, which is also `mmcls.LinearNeck`."""

    NETWORK: ClassVar[str] = "LinearNeck"

    conv_cfg: None = None
    in_channels: Width = Field(description="Channels of the last level that the backbone gives.")
    out_channels: Width
    gap_dim: Literal[0, 1, 2] = Field(
        0, description="2 averages a map over its pixels, 1 NCL tokens; 0 takes a vector."
    )
    norm_cfg: VectorNormConfig | None = Field(VectorNormConfig(type="BN1d"), description="null is none.")
    act_cfg: ActivationConfig | None = Field(None, description="null is none.")

    def spec(self) -> LinearSpec:
        """The neutral spelling."""
        return LinearSpec(
            self.in_channels,
            self.out_channels,
            self.gap_dim > 0,
            None if self.norm_cfg is None else self.norm_cfg.spec(),
            activation_spec(self.act_cfg),
        )

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse a last level of another layout or width."""
        last, wanted = levels[-1], POOLED[self.gap_dim]
        if last.layout != wanted:
            detail = f"{self.gap_dim} does not fit level {last.name}, which is {KINDS[last.layout]}"
            raise InvalidConfig(f"{POINTER}/gap_dim", detail)
        require_widths([self.in_channels], [last])

    def takes(self) -> tuple[int, ...]:
        """The width of the last level."""
        return (self.in_channels,)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """A vector in place of the last level, under its name."""
        return (replace(levels[-1], layout="NC", stride=None, channels=self.out_channels),)


# --- HRFuseScales ---------------------------------------------------------------------------------

FUSED_WIDTHS = (128, 256, 512, 1024)


@dataclass(frozen=True)
class HRFuseSpec:
    """What decides the numbers and the names of the weights; `norm` is not that of the bottlenecks."""

    in_channels: tuple[int, ...]
    out_channels: int
    norm: NormSpec


class HRFuseScales(Neck):
    """HRNet's four levels made one for a classifier (Wang et al., arXiv:1908.07919).

    Keys `increase_layers.{i}.0` (bottlenecks), `downsample_layers.{i}`, `final_layer`.
    """

    def __init__(self, spec: HRFuseSpec) -> None:
        super().__init__()
        self.increase_layers = nn.ModuleList(
            nn.Sequential(_bottleneck(width, fused))
            for width, fused in zip(spec.in_channels, FUSED_WIDTHS, strict=True)
        )
        relu = ActivationSpec()
        self.downsample_layers = nn.ModuleList(
            ConvModule(width, above, 3, stride=2, bias=False, norm=spec.norm, activation=relu)
            for width, above in pairwise(FUSED_WIDTHS)
        )
        self.final_layer = ConvModule(
            FUSED_WIDTHS[-1], spec.out_channels, 1, bias=False, norm=spec.norm, activation=relu
        )

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c_i, h / 2^i, w / 2^i] each, to one [n, out_channels, h / 8, w / 8]."""
        raised = [layer(maps) for layer, maps in zip(self.increase_layers, features, strict=True)]
        fused = raised[0]
        for downsample, maps in zip(self.downsample_layers, raised[1:], strict=True):
            fused = downsample(fused) + maps
        return [self.final_layer(fused)]


def _bottleneck(inputs: int, outputs: int) -> ResidualBlock:
    hidden = outputs // 4
    shortcut = None
    if inputs != outputs:
        shortcut = nn.Sequential(conv1x1(inputs, outputs), nn.BatchNorm2d(outputs))
    convolutions = [conv1x1(inputs, hidden), conv3x3(hidden, hidden), conv1x1(hidden, outputs)]
    return ResidualBlock(convolutions, BATCH_NORM, shortcut)


class HRFuseConfig(OpenMMLabNeckConfig):
    """`mmpretrain.HRFuseScales`, which is also `mmcls.HRFuseScales`."""

    NETWORK: ClassVar[str] = "HRFuseScales"

    conv_cfg: None = None
    in_channels: Annotated[tuple[Width, ...], Field(min_length=4, max_length=4)] = Field(
        description="Channels of the four levels that the backbone gives."
    )
    out_channels: Width = 2048
    norm_cfg: NormConfig = NormConfig(type="BN", momentum=0.1)

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from self.norm_faults(self.norm_cfg, [*FUSED_WIDTHS[1:], self.out_channels])

    def spec(self) -> HRFuseSpec:
        """The neutral spelling."""
        return HRFuseSpec(self.in_channels, self.out_channels, self.norm_cfg.spec())

    def takes(self) -> tuple[int, ...]:
        """Channels of the levels that go in."""
        return self.in_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """One level, under the last one's name."""
        stride = levels[0].stride
        return (
            replace(levels[-1], channels=self.out_channels, stride=None if stride is None else 8 * stride),
        )


GEM = make_neck_family(GeMConfig, GeneralizedMeanPooling, example={"p": 3.0})
LINEAR = make_neck_family(
    LinearConfig, LinearNeck, example={"in_channels": 2048, "out_channels": 512, "gap_dim": 2}
)
HR_FUSE = make_neck_family(
    HRFuseConfig, HRFuseScales, example={"in_channels": [256, 512, 1024, 2048], "out_channels": 2048}
)
