"""SSDVGG, the VGG of the single-shot detector (Liu et al., arXiv:1512.02325), with mmdet's key names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, CheckpointName, Indices, levels_by_index
from service.backbones.freezing import freeze_report
from service.backbones.mobilenet_v2 import weights_or_pretrained
from service.backbones.openmmlab import SpecConfig, deepest, make_family, map_features
from service.backbones.vgg import DEPTHS, WIDTHS
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level, WeightsRef

LAST_WIDTH = 1024


@dataclass(frozen=True)
class Step:
    """One of `features`: a convolution from `inputs` to `width`, its ReLU, or a pooling by `stride`."""

    kind: Literal["conv", "relu", "pool"]
    width: int
    inputs: int = 0
    kernel: int = 3
    stride: int = 1
    dilation: int = 1


def _conv(inputs: int, width: int, kernel: int = 3, dilation: int = 1) -> tuple[Step, Step]:
    return Step("conv", width, inputs, kernel, dilation=dilation), Step("relu", width)


@dataclass(frozen=True)
class SSDVGGSpec:
    """What decides the numbers and the names of the weights."""

    depth: int
    last_pool: bool = False
    ceil_mode: bool = True
    in_channels: int = 3

    def steps(self) -> tuple[Step, ...]:
        """All of `features`: VGG's, and a dilated and a pointwise convolution for its linear layers."""
        steps: list[Step] = []
        inputs = self.in_channels
        for width, count in zip(WIDTHS, DEPTHS[self.depth], strict=True):
            for _ in range(count):
                steps += _conv(inputs, width)
                inputs = width
            steps.append(Step("pool", width, kernel=2, stride=2))
        steps = steps if self.last_pool else steps[:-1]
        steps += [Step("pool", inputs), *_conv(inputs, LAST_WIDTH, dilation=6)]
        return (*steps, *_conv(LAST_WIDTH, LAST_WIDTH, kernel=1))

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map each of `features`."""
        stride, strides = 1, []
        for step in self.steps():
            stride *= step.stride
            strides.append(stride)
        return map_features([step.width for step in self.steps()], strides)


def _layer(step: Step, *, ceil_mode: bool) -> nn.Module:
    if step.kind == "relu":
        return nn.ReLU()
    if step.kind == "pool":
        # The pooling that does not stride is the detector's own, in place of VGG's last.
        padding = 1 if step.stride == 1 else 0
        return nn.MaxPool2d(step.kernel, step.stride, padding, ceil_mode=ceil_mode and step.stride > 1)
    padding = step.dilation * (step.kernel // 2)
    return nn.Conv2d(step.inputs, step.width, step.kernel, padding=padding, dilation=step.dilation)


class SSDVGG(Backbone):
    """Key `features`: convolutions, ReLUs and poolings in one list."""

    def __init__(self, spec: SSDVGGSpec) -> None:
        super().__init__()
        layers = [_layer(step, ceil_mode=spec.ceil_mode) for step in spec.steps()]
        # The library's name for its layers, under which other backbones list what they give.
        self.add_module("features", nn.Sequential(*layers))

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the layers in `nodes`; stops after the deepest of them.

        That of a convolution is that of its ReLU, which the library computes in place.
        """
        layers = list(self.get_submodule("features").children())
        last = deepest(nodes)
        maps, found = images, {}
        for index, layer in enumerate(layers[: last + 2]):
            maps = layer(maps)
            found[str(index)] = maps
            if isinstance(layer, nn.ReLU):
                found[str(index - 1)] = maps
        return {node: found[node] for node in nodes}

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """Nothing: the library has no rule."""
        return freeze_report(self, freeze, ())


# --- mmdet.SSDVGG ---------------------------------------------------------------------------------

VGGStages = Annotated[
    tuple[Annotated[int, Field(strict=True, ge=-64, le=5)], ...], Field(min_length=1, max_length=16)
]


class SSDVGGConfig(SpecConfig):
    """`mmdet.SSDVGG`."""

    NETWORK: ClassVar[str] = "SSDVGG"

    depth: Literal[11, 13, 16, 19] = Field(description="Number of layers of the VGG.")
    with_last_pool: bool = Field(False, description="The last pooling of the VGG.")
    ceil_mode: bool = Field(True, description="Poolings round the size of their maps up.")
    out_indices: VGGStages = Field(
        (3, 4), description="Changes nothing: out_feature_indices say what is returned."
    )
    out_feature_indices: Indices = Field(
        (22, 34), description="Layers, every convolution, ReLU and pooling counted from 0."
    )
    pretrained: CheckpointName | None = Field(
        None, description="Deprecated spelling of init_cfg with this checkpoint."
    )
    input_size: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = Field(
        None, description="Deprecated; changes nothing here."
    )
    l2_norm_scale: Annotated[float, Field(ge=-1e6, le=1e6)] | None = Field(
        None, description="Deprecated; changes nothing here."
    )

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if self.pretrained is not None and (self.init_cfg or self.checkpoint) is not None:
            yield "pretrained", "give pretrained or init_cfg, not both"

    def spec(self) -> SSDVGGSpec:
        """The neutral spelling."""
        return SSDVGGSpec(self.depth, self.with_last_pool, self.ceil_mode)

    def weights(self) -> WeightsRef | None:
        """Where the weights come from."""
        return weights_or_pretrained(super().weights(), self.pretrained)

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_feature_indices`."""
        pointer = "#/backbone/out_feature_indices"
        return levels_by_index(self.out_feature_indices, description.features, pointer=pointer)


SSD_VGG = make_family(
    SSDVGGConfig,
    SSDVGG,
    example={"depth": 16, "out_feature_indices": [22, 34]},
    architectures=tuple(str(depth) for depth in DEPTHS),
)
