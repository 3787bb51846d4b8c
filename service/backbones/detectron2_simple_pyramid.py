"""The simple feature pyramid (Li et al., arXiv:2203.16527): levels of several scales, all made of one map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from service.backbones.base import BackboneConfig
from service.backbones.detectron2_configs import NORM_KINDS, Channels, Fault, NormKey
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
from service.backbones.detectron2_resnet import NORM_MAKERS, NormedConv, NormKind
from service.backbones.detectron2_vit import EXAMPLE as VIT_EXAMPLE
from service.backbones.lazyconfig import short_class


@dataclass(frozen=True)
class SimplePyramidSpec:
    """What decides the numbers and the names of the weights around the backbone inside."""

    input: InputSpec
    scales: tuple[float, ...]
    outputs: int
    norm: NormKind
    bias: bool
    top: TopSpec | None

    def strides(self) -> tuple[int, ...]:
        """Of the levels without those on top."""
        return strides_of(self.input.stride, self.scales)


def strides_of(stride: int, scales: tuple[float, ...]) -> tuple[int, ...]:
    """The strides of a map's enlarged and reduced copies."""
    return tuple(int(stride / scale) for scale in scales)


class SimplePyramid(Pyramid):
    """Keys `simfp_{n}` by the number in the level's name, `top_block`, `net`."""

    INSIDE: ClassVar[str] = "net"

    def __init__(self, spec: SimplePyramidSpec) -> None:
        features = pyramid_features(spec.strides(), spec.outputs, spec.top)
        super().__init__(features, spec.top, [spec.input.node])
        self.spec = spec
        for stride, scale in zip(spec.strides(), spec.scales, strict=True):
            self.add_module(f"simfp_{stage_of(stride)}", nn.Sequential(*_layers(spec, scale)))
        if spec.top is not None:
            self.top_block = TopBlock(spec.top)

    def levels(self, maps: Mapping[str, Tensor], wanted: set[str]) -> dict[str, Tensor]:
        """Each level by itself."""
        numbers = [stage_of(stride) for stride in self.spec.strides()]
        source = maps[self.spec.input.node]
        return {f"p{n}": self.get_submodule(f"simfp_{n}")(source) for n in numbers if f"p{n}" in wanted}


def _layers(spec: SimplePyramidSpec, scale: float) -> list[nn.Module]:
    resized, width = _resizing(spec, scale)
    return [
        *resized,
        NormedConv(width, spec.outputs, 1, spec.norm, bias=spec.bias),
        NormedConv(spec.outputs, spec.outputs, 3, spec.norm, bias=spec.bias),
    ]


def _resizing(spec: SimplePyramidSpec, scale: float) -> tuple[list[nn.Module], int]:
    """The layers that bring the map to a scale, and the channels that they leave."""
    width = spec.input.channels
    if scale <= 1:
        return ([nn.MaxPool2d(2, 2)] if scale < 1 else []), width
    doubled = nn.ConvTranspose2d(width, width // 2, 2, stride=2)
    if scale == 2:
        return [doubled], width // 2
    norm = NORM_MAKERS[spec.norm](width // 2)
    assert norm is not None  # of a scale of 4; the config refuses it
    again = nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2)
    return [doubled, norm, nn.GELU(), again], width // 4


# --- the config -----------------------------------------------------------------------------------

SCALES = (4.0, 2.0, 1.0, 0.5)
ScaleFactor = Annotated[float, Field(ge=0.5, le=4)]


class SimplePyramidConfig(PyramidConfig):
    """`detectron2.SimpleFeaturePyramid`."""

    NETWORK: ClassVar[str] = "detectron2.SimpleFeaturePyramid"
    INSIDE: ClassVar[str] = "net"

    net: Annotated[BackboneConfig, inner_backbone("net"), INNER_SCHEMA]
    in_feature: FeatureName | None = Field(None, description="The map of net; by default its last.")
    out_channels: Channels
    scale_factors: Annotated[tuple[ScaleFactor, ...], Field(min_length=1, max_length=4)] = Field(
        description="Of the levels, from large to small: 4, 2, 1, 0.5 without gaps."
    )
    top_block: TopBlockConfig | None = Field(
        None, description="Levels on top: LastLevelMaxPool, LastLevelP6P7 or LastLevelP6."
    )
    norm: Annotated[NormKey | None, BeforeValidator(short_class)] = Field(
        "LN", description="Behind the convolutions; empty is none, null is none and no biases either."
    )
    square_pad: SquarePad = 0

    def faults(self) -> Iterator[Fault]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from self.inside_faults()
        unknown = [
            (f"scale_factors/{place}", f"{scale:g} is none of 4, 2, 1 and 0.5")
            for place, scale in enumerate(self.scale_factors)
            if scale not in SCALES
        ]
        yield from unknown
        source = self.inside.map(self._source())
        if source is None:
            yield "in_feature", f"is no map that net returns: {self.inside.names}"
        if unknown or source is None:
            return
        strides = strides_of(source.stride, self.scale_factors)
        yield from self._width_faults(source.channels)
        if 0 in strides:
            yield "scale_factors", f"make less than a pixel of a stride of {source.stride}"
            return
        yield from self.contiguous_faults("scale_factors", strides)
        yield from self.top_faults([f"p{stage_of(stride)}" for stride in strides], self.out_channels)

    def _width_faults(self, channels: int) -> Iterator[Fault]:
        largest, norm = max(self.scale_factors), NORM_KINDS[self.norm or ""]
        if channels < largest:
            yield "scale_factors", f"a scale of {largest:g} leaves nothing of {channels} channels"
        if largest == 4 and norm == "none":
            yield "norm", "is needed for a scale of 4"
        inner = [channels // 2] if largest == 4 else []
        yield from self.norm_faults("norm", norm, [*inner, self.out_channels])

    def _source(self) -> str:
        return self.inside.levels[-1].name if self.in_feature is None else self.in_feature

    def inner_config(self) -> BackboneConfig:
        """`net`."""
        return self.net

    def top_config(self) -> MaxPoolTop | P6P7Top | P6Top | None:
        """`top_block`."""
        return self.top_block

    def has_frozen_norms(self) -> bool:
        """Whether the norms of the pyramid itself are constants."""
        return self.norm == "FrozenBN"

    def padded_to(self) -> int:
        """`square_pad`."""
        return self.square_pad

    def spec(self) -> SimplePyramidSpec:
        """The neutral spelling of what is around the backbone inside."""
        source = self.inside.map(self._source())
        assert source is not None
        return SimplePyramidSpec(
            input=source,
            scales=self.scale_factors,
            outputs=self.out_channels,
            norm=NORM_KINDS[self.norm or ""],
            bias=self.norm == "",
            top=self.top_spec(self.out_channels),
        )


EXAMPLE: dict[str, Any] = {
    "net": {"type": "detectron2.ViT", **VIT_EXAMPLE},
    "in_feature": "last_feat",
    "out_channels": 256,
    "scale_factors": list(SCALES),
    "top_block": {"type": "LastLevelMaxPool"},
    "norm": "LN",
    "square_pad": 1024,
}
SIMPLE_PYRAMID = pyramid_family(SimplePyramidConfig, SimplePyramid, example=EXAMPLE)
