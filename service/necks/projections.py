"""The projections that self-supervised learning puts behind a backbone, as mmpretrain and mmselfsup have them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.norms import Eps, NormSpec
from service.errors import InvalidConfig
from service.necks.base import KINDS, POINTER, LevelFacts, Neck, require_maps
from service.necks.classifiers import VectorNormConfig, vector_norm
from service.necks.openmmlab import OpenMMLabNeckConfig, Width, make_neck_family, require_widths

Wide = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
NO_NORM_MOMENTUM = "the library sets it itself"

# --- networks -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSpec:
    """One layer of a projection: linear where it has `outputs`, else a norm, else a ReLU."""

    name: str
    inputs: int = 0
    outputs: int = 0
    bias: bool = True
    norm: NormSpec | None = None
    affine: bool = True

    def make(self) -> nn.Module:
        """The layer, freshly initialised."""
        if self.outputs:
            return nn.Linear(self.inputs, self.outputs, bias=self.bias)
        if self.norm is None:
            return nn.ReLU()
        return vector_norm(self.norm, self.inputs, affine=self.affine)


@dataclass(frozen=True)
class ProjectionSpec:
    """Layers one after the other over the last level; `pooled` takes the mean of its pixels, else all of them."""

    layers: tuple[LayerSpec, ...]
    pooled: bool


class Projection(Neck):
    """Keys are those of the spec's layers: `fc0`, `bn0`, `fc1` and so on."""

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__()
        self.pooled = spec.pooled
        for layer in spec.layers:
            self.add_module(layer.name, layer.make())

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] or [n, c] to [n, outputs]."""
        vectors = as_vectors(features[-1], pooled=self.pooled)
        for layer in self.children():
            vectors = layer(vectors)
        return [vectors]


def as_vectors(maps: Tensor, *, pooled: bool) -> Tensor:
    """[n, c, h, w] to [n, c], or flattened to [n, c * h * w] as vectors are."""
    return maps.mean((2, 3)) if pooled else maps.flatten(1)


@dataclass(frozen=True)
class PairSpec:
    """Two layers with a ReLU between them."""

    inputs: int
    hidden: int
    outputs: int
    pooled: bool = True

    def linear(self) -> nn.Sequential:
        """Over vectors."""
        return nn.Sequential(
            nn.Linear(self.inputs, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.outputs)
        )

    def pointwise(self) -> nn.Sequential:
        """Over every pixel of maps."""
        return nn.Sequential(
            nn.Conv2d(self.inputs, self.hidden, 1), nn.ReLU(), nn.Conv2d(self.hidden, self.outputs, 1)
        )


class MoCoV2Neck(Neck):
    """MoCo v2's projection (Chen et al., arXiv:2003.04297); keys `mlp.0`, `mlp.2`."""

    def __init__(self, spec: PairSpec) -> None:
        super().__init__()
        self.pooled = spec.pooled
        self.mlp = spec.linear()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] or [n, c] to [n, outputs]."""
        return [self.mlp(as_vectors(features[-1], pooled=self.pooled))]


@dataclass(frozen=True)
class DenseSpec:
    """DenseCL's projections; `grid` is how many pixels a side are left of the map, None is all."""

    pair: PairSpec
    grid: int | None


class DenseCLNeck(Neck):
    """DenseCL's projections (Wang et al., arXiv:2011.09157): `mlp` of the whole map, `mlp2` of every pixel."""

    def __init__(self, spec: DenseSpec) -> None:
        super().__init__()
        self.grid = spec.grid
        self.mlp = spec.pair.linear()
        self.mlp2 = spec.pair.pointwise()

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] to [n, outputs], [n, outputs, pixels] and the mean of these, [n, outputs]."""
        maps = features[-1]
        whole = self.mlp(maps.mean((2, 3)))
        pixels = self.mlp2(maps if self.grid is None else F.adaptive_avg_pool2d(maps, self.grid))
        return [whole, pixels.flatten(2), pixels.mean((2, 3))]


@dataclass(frozen=True)
class SwAVSpec:
    """What decides the network; `outputs` 0 is no projection, `hidden` 0 one layer. `norm_name` is a key."""

    inputs: int
    hidden: int
    outputs: int
    normalised: bool
    norm: NormSpec
    norm_name: str


class SwAVNeck(Neck):
    """SwAV's projection (Caron et al., arXiv:2006.09882); key `projection_neck`, its norm under a second name."""

    def __init__(self, spec: SwAVSpec) -> None:
        super().__init__()
        self.normalised = spec.normalised
        self.projection_neck: nn.Module = nn.Identity()
        if spec.outputs and not spec.hidden:
            self.projection_neck = nn.Linear(spec.inputs, spec.outputs)
        elif spec.outputs:
            del self.projection_neck  # the norm's second name comes first
            norm = vector_norm(spec.norm, spec.hidden)
            self.add_module(spec.norm_name, norm)
            first, last = nn.Linear(spec.inputs, spec.hidden), nn.Linear(spec.hidden, spec.outputs)
            self.projection_neck = nn.Sequential(first, norm, nn.ReLU(), last)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] to [n, outputs], of length 1 where they are normalised."""
        vectors = self.projection_neck(as_vectors(features[-1], pooled=True))
        return [F.normalize(vectors, dim=1) if self.normalised else vectors]


@dataclass(frozen=True)
class AveragePoolSpec:
    """Height and width of what comes out."""

    size: tuple[int, int]


class AvgPool2dNeck(Neck):
    """A map averaged to a size, whatever its own; no weights."""

    def __init__(self, spec: AveragePoolSpec) -> None:
        super().__init__()
        self.size = spec.size

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """The last of [n, c, h, w] to [n, c, *size]."""
        return [F.adaptive_avg_pool2d(features[-1], self.size)]


@dataclass(frozen=True)
class VectorNormSpec:
    """A batch norm over vectors."""

    width: int
    norm: NormSpec
    affine: bool


class ClsBatchNormNeck(Neck):
    """MAE's batch norm before a linear classifier (He et al., arXiv:2111.06377); key `bn`."""

    def __init__(self, spec: VectorNormSpec) -> None:
        super().__init__()
        self.bn = vector_norm(spec.norm, spec.width, affine=spec.affine)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[n, c] each, to the same shapes; what is no vector stays as it is."""
        return [self.bn(feature) if feature.ndim == 2 else feature for feature in features]


# --- spellings ------------------------------------------------------------------------------------


class OneLevelConfig(OpenMMLabNeckConfig):
    """A neck over the only level that the backbone gives."""

    conv_cfg: None = None

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse more than one level."""
        if len(levels) != 1:
            raise InvalidConfig(POINTER, f"{self.type} takes one level; the backbone gives {len(levels)}")

    def vector(self, levels: Sequence[LevelFacts], channels: int) -> tuple[LevelFacts, ...]:
        """A vector in place of the last level, under its name."""
        return (replace(levels[-1], layout="NC", stride=None, channels=channels),)


class ProjectionConfig(OneLevelConfig):
    """The keys of a neck that makes vectors of a level."""

    in_channels: Wide = Field(description="Channels of the level that the backbone gives.")
    with_avg_pool: bool = Field(
        True, description="Takes the mean of a map's pixels; false takes a vector, or all of a map's pixels."
    )

    def takes(self) -> tuple[int, ...]:
        """The width of the level."""
        return (self.in_channels,)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse more than one level, or one of another layout or width."""
        super().require(levels)
        self.require_level(levels[-1])

    def require_level(self, level: LevelFacts) -> None:
        """Refuse a level of another layout or width."""
        wanted = ("NCHW",) if self.with_avg_pool else ("NC", "NCHW")
        if level.layout not in wanted:
            detail = f"{str(self.with_avg_pool).lower()} does not fit level {level.name}"
            raise InvalidConfig(f"{POINTER}/with_avg_pool", f"{detail}, which is {KINDS[level.layout]}")
        (width,) = self.takes()
        # How many pixels a map has is not known before there is an image.
        if self.with_avg_pool or level.layout == "NC" or width % level.channels:
            require_widths([width], [level])

    @abstractmethod
    def gives(self) -> int:
        """Channels of the vector that comes out."""

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """A vector in place of the level."""
        return self.vector(levels, self.gives())


class NonLinearConfig(ProjectionConfig):
    """`mmpretrain.NonLinearNeck`."""

    NETWORK: ClassVar[str] = "NonLinearNeck"

    hid_channels: Width
    out_channels: Width
    num_layers: Annotated[int, Field(strict=True, ge=1, le=16)] = Field(
        2, description="Linear layers; of one alone, hid_channels come out."
    )
    with_bias: bool = Field(False, description="Of all linear layers but the last.")
    with_last_bn: bool = Field(True, description="A norm behind the last layer.")
    with_last_bn_affine: bool = Field(True, description="A weight and a bias of that norm.")
    with_last_bias: bool = Field(False, description="Of the last linear layer.")
    norm_cfg: VectorNormConfig = VectorNormConfig(type="SyncBN")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.norm_cfg.type == "LN" and self.with_last_bn and self.num_layers > 1:
            yield "norm_cfg/type", "LN has no affine; set with_last_bn to false"

    def spec(self) -> ProjectionSpec:
        """The neutral spelling."""
        norm, hidden = self.norm_cfg.spec(), self.hid_channels
        layers = [
            LayerSpec("fc0", self.in_channels, hidden, self.with_bias),
            LayerSpec("bn0", hidden, norm=norm),
        ]
        for place in range(1, self.num_layers):
            last = place == self.num_layers - 1
            width = self.out_channels if last else hidden
            bias = self.with_last_bias if last else self.with_bias
            layers += [LayerSpec(f"relu{place}"), LayerSpec(f"fc{place}", hidden, width, bias)]
            if not last or self.with_last_bn:
                affine = self.with_last_bn_affine if last else True
                layers.append(LayerSpec(f"bn{place}", width, norm=norm, affine=affine))
        return ProjectionSpec(tuple(layers), self.with_avg_pool)

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels if self.num_layers > 1 else self.hid_channels


class SelfsupNonLinearConfig(NonLinearConfig):
    """`mmselfsup.NonLinearNeck`."""

    vit_backbone: bool = Field(False, description="Takes the class token, which a ViT gives beside its map.")

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """As without, but for a map beside the class token."""
        if not self.vit_backbone:
            super().require(levels)
        elif len(levels) != 2 or len({level.index for level in levels}) != 1:
            detail = "takes one level and its class token"
            raise InvalidConfig(f"{POINTER}/vit_backbone", f"{detail}; the backbone gives {len(levels)}")
        else:
            self.require_level(levels[-1])


class PairConfig(ProjectionConfig):
    """`mmpretrain.MoCoV2Neck`."""

    NETWORK: ClassVar[str] = "MoCoV2Neck"

    hid_channels: Width
    out_channels: Width

    def spec(self) -> PairSpec:
        """The neutral spelling."""
        return PairSpec(self.in_channels, self.hid_channels, self.out_channels, self.with_avg_pool)

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels


class DenseCLConfig(ProjectionConfig):
    """`mmpretrain.DenseCLNeck`."""

    NETWORK: ClassVar[str] = "DenseCLNeck"

    in_channels: Width = Field(description="Channels of the map that the backbone gives.")
    with_avg_pool: Literal[True] = True
    hid_channels: Width
    out_channels: Width
    num_grid: Annotated[int, Field(strict=True, ge=1, le=64)] | None = Field(
        None, description="Pixels a side that the map is averaged to; null is all there are."
    )

    def spec(self) -> DenseSpec:
        """The neutral spelling."""
        return DenseSpec(PairSpec(self.in_channels, self.hid_channels, self.out_channels), self.num_grid)

    def gives(self) -> int:
        """Channels of everything that comes out."""
        return self.out_channels

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The vector of the map, the vectors of its pixels with their channels first, and the mean of these."""
        del levels
        return (
            LevelFacts(0, "0", "NC", self.out_channels, None),
            LevelFacts(1, "1", "NCL", self.out_channels, None),
            LevelFacts(2, "2", "NC", self.out_channels, None),
        )


class SwAVConfig(ProjectionConfig):
    """`mmpretrain.SwAVNeck`; it is given one crop, whose only level it takes."""

    NETWORK: ClassVar[str] = "SwAVNeck"
    NORM_NAME: ClassVar[str] = "norm"

    with_avg_pool: Literal[True] = Field(True, description="False gives nothing in the library.")
    hid_channels: Annotated[int, Field(strict=True, ge=0, le=16384)] = Field(
        description="0 is a projection of one linear layer."
    )
    out_channels: Annotated[int, Field(strict=True, ge=0, le=16384)] = Field(
        description="0 is no projection."
    )
    with_l2norm: bool = Field(True, description="Vectors of length 1.")
    norm_cfg: VectorNormConfig = VectorNormConfig(type="SyncBN")

    def spec(self) -> SwAVSpec:
        """The neutral spelling."""
        return SwAVSpec(
            self.in_channels,
            self.hid_channels,
            self.out_channels,
            self.with_l2norm,
            self.norm_cfg.spec(),
            self.NORM_NAME,
        )

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels or self.in_channels


class SelfsupSwAVConfig(SwAVConfig):
    """`mmselfsup.SwAVNeck`: the same by another key name."""

    NORM_NAME: ClassVar[str] = "bn"


class SelfsupLinearConfig(ProjectionConfig):
    """`mmselfsup.LinearNeck`."""

    NETWORK: ClassVar[str] = "Projection"

    out_channels: Width

    def spec(self) -> ProjectionSpec:
        """The neutral spelling."""
        return ProjectionSpec(
            (LayerSpec("fc", self.in_channels, self.out_channels),), pooled=self.with_avg_pool
        )

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels


class _OwnMomentumConfig(ProjectionConfig):
    """A projection whose norm has a momentum of the library's own."""

    norm_cfg: VectorNormConfig = VectorNormConfig(type="SyncBN")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.norm_cfg.momentum is not None:
            yield "norm_cfg/momentum", NO_NORM_MOMENTUM
        if self.norm_cfg.type == "LN":
            yield "norm_cfg/type", "LN has no momentum"


class ODCConfig(_OwnMomentumConfig):
    """`mmselfsup.ODCNeck` (Zhan et al., arXiv:2006.10645)."""

    NETWORK: ClassVar[str] = "Projection"

    hid_channels: Width
    out_channels: Width

    def spec(self) -> ProjectionSpec:
        """The neutral spelling."""
        hidden = self.hid_channels
        layers = (
            LayerSpec("fc0", self.in_channels, hidden),
            LayerSpec("bn0", hidden, norm=self.norm_cfg.spec(), affine=False),
            LayerSpec("relu0"),
            LayerSpec("fc1", hidden, self.out_channels),
            LayerSpec("relu1"),
        )
        return ProjectionSpec(layers, self.with_avg_pool)

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels


class RelativeLocConfig(_OwnMomentumConfig):
    """`mmselfsup.RelativeLocNeck` (Doersch et al., arXiv:1505.05192), over two crops' channels beside each other."""

    NETWORK: ClassVar[str] = "Projection"

    in_channels: Annotated[int, Field(strict=True, ge=1, le=8192)] = Field(
        description="Channels of one crop: the level has twice as many."
    )
    out_channels: Width
    norm_cfg: VectorNormConfig = VectorNormConfig(type="BN1d")

    def takes(self) -> tuple[int, ...]:
        """The width of the level."""
        return (2 * self.in_channels,)

    def spec(self) -> ProjectionSpec:
        """The neutral spelling."""
        layers = (
            LayerSpec("fc", 2 * self.in_channels, self.out_channels),
            LayerSpec("bn", self.out_channels, norm=self.norm_cfg.spec()),
            LayerSpec("relu"),
        )
        return ProjectionSpec(layers, self.with_avg_pool)

    def gives(self) -> int:
        """Channels of the vector that comes out."""
        return self.out_channels


Side = Annotated[int, Field(strict=True, ge=1, le=64)]


class AvgPool2dConfig(OneLevelConfig):
    """`mmselfsup.AvgPool2dNeck`."""

    NETWORK: ClassVar[str] = "AvgPool2dNeck"

    output_size: Side | tuple[Side, Side] = Field(1, description="Height and width of what comes out.")

    def spec(self) -> AveragePoolSpec:
        """The neutral spelling."""
        size = self.output_size
        return AveragePoolSpec((size, size) if isinstance(size, int) else size)

    def takes(self) -> tuple[int, ...]:
        """Nothing in particular."""
        return ()

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse more than one level, or one that is not a map."""
        super().require(levels)
        require_maps(levels, self.type)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The level without a stride: its size is not that of the image."""
        return (replace(levels[0], stride=None),)


class ClsBatchNormConfig(OpenMMLabNeckConfig):
    """`mmpretrain.ClsBatchNormNeck`."""

    NETWORK: ClassVar[str] = "ClsBatchNormNeck"

    conv_cfg: None = None
    input_features: Width = Field(description="Channels of every vector that the backbone gives.")
    affine: bool = Field(False, description="A weight and a bias.")
    eps: Eps = 1e-6

    def spec(self) -> VectorNormSpec:
        """The neutral spelling."""
        return VectorNormSpec(self.input_features, NormSpec("bn", self.eps), self.affine)

    def takes(self) -> tuple[int, ...]:
        """The width of any level."""
        return (self.input_features,)

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not vectors of this width."""
        for level in levels:
            if level.layout != "NC":
                detail = f"{self.type} takes vectors; level {level.name} is {KINDS[level.layout]}"
                raise InvalidConfig(POINTER, f"{detail} ({level.layout})")
            if level.channels != self.input_features:
                detail = f"level {level.name} has {level.channels} channels, not {self.input_features}"
                raise InvalidConfig(f"{POINTER}/input_features", detail)

    def outputs(self, levels: Sequence[LevelFacts]) -> tuple[LevelFacts, ...]:
        """The levels as they are."""
        return tuple(levels)


class SelfsupClsBatchNormConfig(ClsBatchNormConfig):
    """`mmselfsup.ClsBatchNormNeck`: each level is a map or tokens, and the class token that it norms."""

    def require(self, levels: Sequence[LevelFacts]) -> None:
        """Refuse levels that are not beside a class token of this width."""
        for place in range(0, len(levels), 2):
            pair = levels[place : place + 2]
            if len({level.index for level in pair}) == len(pair) or pair[0].layout == "NC":
                detail = f"takes levels beside their class tokens; level {pair[0].name} has none"
                raise InvalidConfig(POINTER, f"{self.type} {detail}")
            super().require(pair[1:])


PAIR_EXAMPLE = {"in_channels": 2048, "hid_channels": 2048, "out_channels": 128}
NON_LINEAR = make_neck_family(NonLinearConfig, Projection, example=PAIR_EXAMPLE)
SELFSUP_NON_LINEAR = make_neck_family(SelfsupNonLinearConfig, Projection, example=PAIR_EXAMPLE)
MOCO_V2 = make_neck_family(PairConfig, MoCoV2Neck, example=PAIR_EXAMPLE)
DENSE_CL = make_neck_family(DenseCLConfig, DenseCLNeck, example=PAIR_EXAMPLE)
SWAV = make_neck_family(SwAVConfig, SwAVNeck, example=PAIR_EXAMPLE)
SELFSUP_SWAV = make_neck_family(SelfsupSwAVConfig, SwAVNeck, example=PAIR_EXAMPLE)
SELFSUP_LINEAR = make_neck_family(
    SelfsupLinearConfig, Projection, example={"in_channels": 2048, "out_channels": 128}
)
ODC = make_neck_family(ODCConfig, Projection, example={**PAIR_EXAMPLE, "hid_channels": 512})
RELATIVE_LOC = make_neck_family(
    RelativeLocConfig, Projection, example={"in_channels": 1024, "out_channels": 4096}
)
AVG_POOL_2D = make_neck_family(AvgPool2dConfig, AvgPool2dNeck, example={"output_size": 1})
SELFSUP_CLS_BATCH_NORM = make_neck_family(
    SelfsupClsBatchNormConfig, ClsBatchNormNeck, example={"input_features": 192}
)
CLS_BATCH_NORM = make_neck_family(ClsBatchNormConfig, ClsBatchNormNeck, example={"input_features": 2048})
