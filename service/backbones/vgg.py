"""VGG (Simonyan and Zisserman, arXiv:1409.1556) with mmpretrain's key names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator
from torch import Tensor, nn

from service.backbones.base import Backbone, Indices
from service.backbones.norms import NormConfig, NormSpec
from service.backbones.openmmlab import (
    ActivationConfig,
    ActivationSpec,
    ConvConfig,
    ConvModule,
    OpenMMLabConfig,
    deepest,
    frozen_by_stage,
    make_family,
    map_features,
    norm_fault,
    pads_same,
)
from service.checkpoints.layouts import KeyLayout, KeyRule, Naming, rules
from service.config.spec import Description, FeatureInfo, Freeze, FreezeReport, Level
from service.errors import InvalidConfig

# convolutions of the stages
DEPTHS: dict[int, tuple[int, ...]] = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
WIDTHS = (64, 128, 256, 512, 512)
# of the map that a classifier takes
MAP_SIDE = 7
MIN_CLASSIFIED_STAGES = 4


@dataclass(frozen=True)
class VGGSpec:
    """What decides the numbers and the names of the weights; 0 `classes` is no classifier."""

    depth: int
    stages: int
    dilations: tuple[int, ...]
    norm: NormSpec | None
    activation: ActivationSpec
    same_pad: bool = False
    ceil_mode: bool = False
    last_pool: bool = True
    in_channels: int = 3
    classes: int = 0

    def features(self) -> tuple[FeatureInfo, ...]:
        """One map a stage, after its pooling; then a number a class."""
        strides = [2 ** (stage + 1) for stage in range(self.stages)]
        if not self.last_pool:
            strides[-1] //= 2
        scores = FeatureInfo(self.stages, str(self.stages), self.classes, None, "NC")
        return map_features(WIDTHS[: self.stages], strides) + ((scores,) if self.classes else ())


class VGG(Backbone):
    """Convolutions and poolings in one list, `features`; a stage ends with its pooling."""

    def __init__(self, spec: VGGSpec) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        self.ends: list[int] = []
        inputs = spec.in_channels
        for stage in range(spec.stages):
            for _ in range(DEPTHS[spec.depth][stage]):
                layers.append(_conv(spec, inputs, stage))
                inputs = WIDTHS[stage]
            if stage < spec.stages - 1 or spec.last_pool:
                layers.append(nn.MaxPool2d(2, stride=2, ceil_mode=spec.ceil_mode))
            self.ends.append(len(layers))
        # The library's name for its layers, under which other backbones list what they give.
        self.add_module("features", nn.Sequential(*layers))
        self.classifier = _classifier(spec.classes) if spec.classes else None

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Maps of the stages in `nodes`, perhaps the classes' numbers; stops after the deepest of them.

        Raises:
            InvalidConfig: classes are asked of images of another size.
        """
        maps, found, start, last = images, {}, 0, deepest(nodes)
        for stage in range(min(last + 1, len(self.ends))):
            for layer in self._layers()[start : self.ends[stage]]:
                maps = layer(maps)
            found[str(stage)] = maps
            start = self.ends[stage]
        if self.classifier is not None and last == len(self.ends):
            found[str(last)] = self.classifier(_flat(maps))
        return {node: found[node] for node in nodes}

    def _layers(self) -> list[nn.Module]:
        return list(self.get_submodule("features").children())

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is the first k stages, 0 nothing."""
        ends = [0, *self.ends]
        return frozen_by_stage(self, freeze, lambda k: [f"features.{index}" for index in range(ends[k])])


def _classifier(classes: int) -> nn.Sequential:
    # Dropout, which is what the library has here, keeps the numbers in the keys.
    return nn.Sequential(
        *(nn.Linear(WIDTHS[-1] * MAP_SIDE**2, 4096), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
        nn.Linear(4096, classes),
    )


def _flat(maps: Tensor) -> Tensor:
    if maps.shape[2:] != (MAP_SIDE, MAP_SIDE):
        detail = f"classes need a map of {MAP_SIDE}x{MAP_SIDE}; these images give {list(maps.shape[2:])}"
        raise InvalidConfig("#/backbone/num_classes", detail)
    return maps.flatten(1)


def _conv(spec: VGGSpec, inputs: int, stage: int) -> ConvModule:
    return ConvModule(
        inputs,
        WIDTHS[stage],
        3,
        dilation=spec.dilations[stage],
        bias=True,
        norm=spec.norm,
        activation=spec.activation,
        same_pad=spec.same_pad,
    )


# --- mmpretrain.VGG = mmcls.VGG -------------------------------------------------------------------


class VGGConfig(OpenMMLabConfig):
    """`mmpretrain.VGG`, which is also `mmcls.VGG`."""

    NETWORK: ClassVar[str] = "VGG"

    depth: Literal[11, 13, 16, 19] = Field(description="Number of layers.")
    num_classes: Annotated[int, Field(strict=True, ge=-1, le=100_000)] = Field(
        -1, description="Above 0: a number a class comes after the maps, from images of 224 pixels."
    )
    num_stages: Annotated[int, Field(strict=True, ge=1, le=5)] = 5
    dilations: tuple[Annotated[int, Field(strict=True, ge=1, le=16)], ...] = Field(
        (1, 1, 1, 1, 1), min_length=1, max_length=5
    )
    out_indices: Indices = Field(
        (-1,),
        description="Stages, each after its pooling: 0 at stride 2. The classes' numbers, if there are any, come "
        "last, asked for or not.",
    )
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=5)] = Field(
        -1, description="k freezes the first k stages; -1 and 0 nothing."
    )
    conv_cfg: ConvConfig | None = None
    norm_cfg: NormConfig | None = None
    act_cfg: ActivationConfig = ActivationConfig(type="ReLU")
    ceil_mode: bool = False
    with_last_pool: bool = True

    @field_validator("out_indices", mode="before")
    @classmethod
    def _null_is_the_last(cls, value: object) -> object:
        return (-1,) if value is None else value

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        if len(self._dilations()) != self.num_stages:
            yield "dilations", f"has {len(self.dilations)} entries for {self.num_stages} stages"
        if self.frozen_stages > self.num_stages:
            yield "frozen_stages", f"{self.frozen_stages} is more than the {self.num_stages} stages"
        if self.norm_cfg is not None and (fault := norm_fault(self.norm_cfg, WIDTHS)) is not None:
            yield fault

        if self.num_classes > 0 and self.num_stages < MIN_CLASSIFIED_STAGES:
            yield "num_classes", f"classes need {MIN_CLASSIFIED_STAGES} stages or 5"

    def selected(self, description: Description) -> tuple[Level, ...]:
        """The levels of `out_indices`, and the classes' numbers."""
        levels, last = super().selected(description), description.features[-1]
        if self.num_classes <= 0 or levels[-1].index == last.index:
            return levels
        maps = tuple(level for level in levels if level.index != last.index)
        return (*maps, Level(last.index, last.node, last.node))

    def _dilations(self) -> tuple[int, ...]:
        return self.dilations if "dilations" in self.model_fields_set else self.dilations[: self.num_stages]

    def spec(self) -> VGGSpec:
        """The neutral spelling."""
        return VGGSpec(
            self.depth,
            self.num_stages,
            self._dilations(),
            self.norm_cfg.spec() if self.norm_cfg is not None else None,
            self.act_cfg.spec(),
            same_pad=pads_same(self.conv_cfg),
            ceil_mode=self.ceil_mode,
            last_pool=self.with_last_pool,
            classes=max(self.num_classes, 0),
        )


def _place(name: str) -> int:
    return int(name.split(".")[1])


def _torchvision_rules(names: Collection[str], ours: bool) -> tuple[KeyRule, ...]:
    """torchvision counts every layer: a convolution, perhaps its norm, a ReLU; here these three are one."""
    numbered = [name for name in names if re.fullmatch(r"features\.\d+\..+", name)]
    norms = {_place(name) for name in numbered if name.endswith("running_mean")}
    given = sorted({_place(name) for name in numbered} - (set() if ours else norms))
    normed = bool(norms)
    layers = 3 if normed else 2
    step = 1 if ours else layers
    found: list[KeyRule] = []
    mine = theirs = 0
    for place, following in pairwise((*given, *given[-1:])):
        found += rules({f"features.{mine}.conv.{{leaf}}": f"features.{theirs}.{{leaf}}"})
        if normed:
            found += rules({f"features.{mine}.bn.{{leaf}}": f"features.{theirs + 1}.{{leaf}}"})
        pooled = following - place > step
        mine, theirs = mine + 1 + pooled, theirs + layers + pooled
    return (*found, *rules({"classifier.{rest}": "classifier.{rest}"}))


VGG_NAMES = Naming(
    "VGG",
    own=("mmpretrain",),
    marks=("features.0.conv.weight",),
    stem_kernel=("features.0.conv.weight", 3),
    layouts=(KeyLayout("torchvision", _torchvision_rules), KeyLayout("timm", _torchvision_rules)),
)


VGG_FAMILY = make_family(
    VGGConfig,
    VGG,
    example={"depth": 16, "norm_cfg": {"type": "BN"}, "out_indices": [2, 3, 4]},
    architectures=tuple(str(depth) for depth in DEPTHS),
    naming=VGG_NAMES,
)
