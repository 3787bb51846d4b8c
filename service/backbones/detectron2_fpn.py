"""detectron2's FPN (Lin et al., arXiv:1612.03144) around any of its backbones, and its two builders for yacs.

`build_resnet_fpn_backbone` puts a max pool on top, `build_retinanet_resnet_fpn_backbone` two convolutions over `res5`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import BeforeValidator, Field
from torch import Tensor

from service.backbones.base import BackboneConfig
from service.backbones.detectron2_configs import (
    NORM_KINDS,
    Channels,
    Fault,
    NormKey,
    YacsBackbone,
    YacsConfig,
    YacsFpn,
    YacsModel,
    weights_of_yacs,
)
from service.backbones.detectron2_pyramid import (
    INNER_SCHEMA,
    FeatureName,
    InputSpec,
    MaxPoolTop,
    P6P7Top,
    P6Top,
    Pyramid,
    PyramidConfig,
    SquarePad,
    TopBlock,
    TopBlockConfig,
    TopSpec,
    inner_backbone,
    pyramid_family,
    pyramid_features,
    stage_of,
)
from service.backbones.detectron2_resnet import NormedConv, NormKind
from service.backbones.lazyconfig import YACS_BUILDER, YACS_BUILDERS, short_class
from service.config.spec import WeightsRef

Builder = Literal["build_resnet_backbone", "build_resnet_fpn_backbone", "build_retinanet_resnet_fpn_backbone"]
FuseType = Literal["sum", "avg"]
FeatureNames = Annotated[tuple[FeatureName, ...], Field(min_length=1, max_length=8)]


@dataclass(frozen=True)
class FPNSpec:
    """What decides the numbers and the names of the weights around the backbone inside.

    `inputs` are its maps, shallow to deep. `average` halves each sum with what comes from above.
    """

    inputs: tuple[InputSpec, ...]
    outputs: int
    norm: NormKind
    bias: bool
    average: bool
    top: TopSpec | None


class FPN(Pyramid):
    """Keys `fpn_lateral{n}`, `fpn_output{n}` by the number in the level's name, `top_block`, `bottom_up`."""

    INSIDE: ClassVar[str] = "bottom_up"

    def __init__(self, spec: FPNSpec) -> None:
        strides = [one.stride for one in spec.inputs]
        features = pyramid_features(strides, spec.outputs, spec.top)
        super().__init__(features, spec.top, [one.node for one in spec.inputs])
        self.spec = spec
        for one in spec.inputs:
            lateral, output = (
                NormedConv(inputs, spec.outputs, side, spec.norm, bias=spec.bias)
                for inputs, side in ((one.channels, 1), (spec.outputs, 3))
            )
            self.add_module(f"fpn_lateral{stage_of(one.stride)}", lateral)
            self.add_module(f"fpn_output{stage_of(one.stride)}", output)
        if spec.top is not None:
            self.top_block = TopBlock(spec.top)

    def levels(self, maps: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
        """From the deepest map up, each level with what comes from the one above it."""
        found: dict[str, Tensor] = {}
        above: Tensor | None = None
        for one in reversed(self.spec.inputs):
            if wanted <= found.keys():
                break
            stage = stage_of(one.stride)
            merged: Tensor = self.get_submodule(f"fpn_lateral{stage}")(maps[one.node])
            if above is not None:
                merged = merged + F.interpolate(above, scale_factor=2.0, mode="nearest")
                merged = merged / 2 if self.spec.average else merged
            if f"p{stage}" in wanted:
                found[f"p{stage}"] = self.get_submodule(f"fpn_output{stage}")(merged)
            above = merged
        return found


# --- configs --------------------------------------------------------------------------------------


class _FPNConfig(PyramidConfig):
    """What all spellings have in common."""

    NETWORK: ClassVar[str] = "detectron2.FPN"
    INSIDE: ClassVar[str] = "bottom_up"
    # Where in the config what `faults` speaks of is.
    KEYS: ClassVar[Mapping[str, str]] = {}

    @property
    @abstractmethod
    def around(self) -> Around:
        """The keys that are not about the backbone inside."""

    def has_frozen_norms(self) -> bool:
        """Whether the norms of the pyramid itself are constants."""
        return self.around.norm == "FrozenBN"

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        for key, detail in self._faults():
            head, slash, rest = key.partition("/")
            yield self.KEYS.get(head, head) + slash + rest, detail

    def _faults(self) -> Iterator[Fault]:
        yield from self.inside_faults()
        around = self.around
        unknown = [
            (
                f"in_features/{position}",
                f"{name} is no map that the backbone inside returns: {self.inside.names}",
            )
            for position, name in enumerate(around.in_features)
            if self.inside.map(name) is None
        ]
        yield from unknown
        if unknown:
            return
        strides = [one.stride for one in self._inputs()]
        yield from self.contiguous_faults("in_features", strides)
        yield from self.norm_faults("norm", NORM_KINDS[around.norm or ""], [around.out_channels])
        yield from self.top_faults([f"p{stage_of(stride)}" for stride in strides], around.out_channels)

    def _inputs(self) -> tuple[InputSpec, ...]:
        found = (self.inside.map(name) for name in self.around.in_features)
        return tuple(one for one in found if one is not None)

    def spec(self) -> FPNSpec:
        """The neutral spelling of what is around the backbone inside."""
        around = self.around
        return FPNSpec(
            inputs=self._inputs(),
            outputs=around.out_channels,
            norm=NORM_KINDS[around.norm or ""],
            # The library asks whether the norm is an empty string, which null is not.
            bias=around.norm == "",
            average=around.fuse_type == "avg",
            top=self.top_spec(around.out_channels),
        )


@dataclass(frozen=True)
class Around:
    """What a config says of an FPN itself."""

    in_features: tuple[str, ...]
    out_channels: int
    norm: NormKey | None
    fuse_type: FuseType


class FPNConfig(_FPNConfig):
    """`detectron2.FPN`."""

    bottom_up: Annotated[BackboneConfig, inner_backbone("bottom_up"), INNER_SCHEMA]
    in_features: FeatureNames = Field(description="Maps of bottom_up, shallow to deep; strides must double.")
    out_channels: Channels
    norm: Annotated[NormKey | None, BeforeValidator(short_class)] = Field(
        "", description="Behind every convolution; empty is none, null is none and no biases either."
    )
    top_block: TopBlockConfig | None = Field(
        None, description="Levels on top: LastLevelMaxPool, LastLevelP6P7 or LastLevelP6."
    )
    fuse_type: FuseType = Field("sum", description="How a level joins with the one above it.")
    square_pad: SquarePad = 0

    @property
    def around(self) -> Around:
        """The keys that are not about the backbone inside."""
        return Around(self.in_features, self.out_channels, self.norm, self.fuse_type)

    def inner_config(self) -> BackboneConfig:
        """`bottom_up`."""
        return self.bottom_up

    def top_config(self) -> MaxPoolTop | P6P7Top | P6Top | None:
        """`top_block`."""
        return self.top_block

    def padded_to(self) -> int:
        """`square_pad`."""
        return self.square_pad


# --- yacs -----------------------------------------------------------------------------------------


class YacsFpnBackbone(YacsBackbone):
    """`MODEL.BACKBONE`."""

    NAME: Builder = "build_resnet_backbone"  # type: ignore[assignment]  # more names than its base


class YacsFpnModel(YacsModel):
    """`MODEL`, as far as it is about the backbone."""

    BACKBONE: YacsFpnBackbone = YacsFpnBackbone()
    FPN: YacsFpn = YacsFpn()


class YacsFPNConfig(_FPNConfig):
    """`detectron2.build_resnet_fpn_backbone` and `build_retinanet_resnet_fpn_backbone`: `MODEL.FPN` with the ResNet."""

    KEYS: ClassVar[Mapping[str, str]] = {
        "bottom_up": "MODEL/RESNETS",
        "in_features": "MODEL/FPN/IN_FEATURES",
        "out_channels": "MODEL/FPN/OUT_CHANNELS",
        "norm": "MODEL/FPN/NORM",
        "top_block": "MODEL/RESNETS/OUT_FEATURES",
    }

    MODEL: YacsFpnModel = YacsFpnModel()

    @property
    def around(self) -> Around:
        """`MODEL.FPN`."""
        given = self.MODEL.FPN
        return Around(given.IN_FEATURES, given.OUT_CHANNELS, given.NORM, given.FUSE_TYPE)

    def _faults(self) -> Iterator[Fault]:
        own, name = self.type.rpartition(".")[2], self.MODEL.BACKBONE.NAME
        if name not in (own, "build_resnet_backbone"):
            yield "MODEL/BACKBONE/NAME", f"is not {own}, which the type says"
        if not self.around.in_features:
            yield "in_features", "needs at least one feature of MODEL.RESNETS.OUT_FEATURES"
            return
        yield from super()._faults()

    def inner_config(self) -> YacsConfig:
        """`MODEL.RESNETS` and `MODEL.BACKBONE.FREEZE_AT`."""
        backbone = YacsBackbone(FREEZE_AT=self.MODEL.BACKBONE.FREEZE_AT)
        return YacsConfig(type=YACS_BUILDER, MODEL=YacsModel(BACKBONE=backbone, RESNETS=self.MODEL.RESNETS))

    def top_config(self) -> MaxPoolTop | P6P7Top | P6Top | None:
        """What the builder puts on top."""
        return TOPS[self.type]

    def weights(self) -> WeightsRef | None:
        """`MODEL.WEIGHTS`, or the checkpoint named as in every type."""
        return weights_of_yacs(self.MODEL.WEIGHTS, super().weights())


TOPS: dict[str, MaxPoolTop | P6P7Top] = {
    YACS_BUILDERS["build_resnet_fpn_backbone"]: MaxPoolTop(type="LastLevelMaxPool"),
    YACS_BUILDERS["build_retinanet_resnet_fpn_backbone"]: P6P7Top(type="LastLevelP6P7"),
}

# --- the families ---------------------------------------------------------------------------------

STAGES = ["res2", "res3", "res4", "res5"]
EXAMPLE: dict[str, Any] = {
    "bottom_up": {"type": "detectron2.ResNet", "depth": 50, "norm": "FrozenBN", "out_features": STAGES},
    "in_features": STAGES,
    "out_channels": 256,
    "top_block": {"type": "LastLevelMaxPool"},
}
YACS_EXAMPLE: dict[str, Any] = {
    "MODEL": {
        "BACKBONE": {"FREEZE_AT": 2},
        "RESNETS": {"DEPTH": 50, "OUT_FEATURES": STAGES[1:]},
        "FPN": {"IN_FEATURES": STAGES[1:]},
    }
}
FPN_FAMILY = pyramid_family(FPNConfig, FPN, example=EXAMPLE)
YACS_FPN = pyramid_family(YacsFPNConfig, FPN, example=YACS_EXAMPLE)
